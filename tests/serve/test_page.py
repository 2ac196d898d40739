"""The files of the page: nothing of another host, no script but its own, and colours that can be read."""

import re
from importlib.resources import files

import httpx2 as httpx
import pytest

from meristem.serve import page
from serving import error_of, new_session, serving

CSS = (files(page) / "style.css").read_text(encoding="utf-8")
HTML = (files(page) / "index.html").read_text(encoding="utf-8")
SCRIPTS = {each.name: each.read_text(encoding="utf-8") for each in files(page).iterdir() if each.name.endswith(".js")}
TEXT = 4.5
"""Least contrast of text, by WCAG 2.2 AA; of what else has to be seen it is 3."""


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("data")) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        yield client


def test_everything_that_the_page_names_is_served_with_its_policy(web):
    paths = ["/", *re.findall(r'(?:href|src)="(/[^"]+)"', HTML)]
    for path in paths:
        imported = re.findall(r'from "\./([\w.]+)"', SCRIPTS.get(path.removeprefix("/page/"), ""))
        paths += {f"/page/{name}" for name in imported} - set(paths)
    assert {"/page/chat.js", "/page/memory.js", "/page/chart.js", "/page/api.js", "/page/style.css"} < set(paths)
    for path in paths:
        answer = web.get(path)
        assert answer.status_code == 200 and answer.content, path
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src")
        assert "unsafe" not in policy and "*" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
    assert error_of(web.get("/page/__init__.py"), 404)


def test_nothing_stands_in_the_html_that_the_policy_would_refuse():
    assert not re.search(r"<script(?![^>]* src=)|<style| style=| on\w+=|javascript:|https?://", HTML)
    for name, text in SCRIPTS.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
        assert set(re.findall(r"https?://[\w./]+", text)) <= {"http://www.w3.org/2000/svg"}, name
    assert not re.search(r"@import|url\(", CSS)


def test_the_routes_of_the_view(web):
    session = new_session(web)
    web.post(f"/v1/sessions/{session}/feed", json={"text": "Ada lives in Oslo."}).raise_for_status()
    said = {"session": session, "messages": [{"role": "user", "content": "Where?"}], "max_tokens": 5, "seed": 1}
    web.post("/v1/chat/completions", json=said).raise_for_status()
    reading = web.get(f"/v1/sessions/{session}/turns/2/reading").json()
    tokens = reading["tokens"]
    assert (reading["object"], tokens["n_read"], len(tokens["texts"])) == ("turn.reading", 7, 12)
    nats = web.get(f"/v1/sessions/{session}/turns").json()["data"][1]["nats"]
    assert sum(tokens["nats"][:7]) == pytest.approx(nats, rel=1e-4)
    sources = web.get(f"/v1/sessions/{session}/turns/2/sources").json()
    assert (sources["object"], sources["measured"], sources["n_tokens"]) == ("turn.sources", "reply", 5)
    assert [each["last"] for each in sources["sources"]] == [1]
    for what in ("reading", "sources"):
        assert error_of(web.get(f"/v1/sessions/{session}/turns/3/{what}"), 404)["code"] == "session_not_found"
        assert error_of(web.get(f"/v1/sessions/nobody/turns/1/{what}"), 404)["code"] == "session_not_found"
        assert error_of(web.get(f"/v1/sessions/{session}/turns/0/{what}"), 400)


def test_only_routes_of_the_api_are_published(web):
    paths = web.get("/openapi.json").json()["paths"]
    assert "/v1/sessions/{session_id}/turns/{turn}/reading" in paths
    assert not any(path == "/" or path.startswith("/page/") for path in paths)


def colours(is_dark: bool) -> dict[str, str]:
    """The variables of the style sheet in one of its schemes."""
    light, dark = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    found = dict(re.findall(r"--([\w-]+): (#\w{6});", light))
    return found | (dict(re.findall(r"--([\w-]+): (#\w{6});", dark)) if is_dark else {})


def luminance(colour: str) -> float:
    """Relative luminance, by WCAG."""
    shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_is_measured():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_colours_have_contrast(is_dark):
    """Text on all that it stands on; edges of controls, lines of charts and the focus on the surfaces."""
    named = colours(is_dark)
    grounds = ("ground", "surface", "raised", "accent-soft")
    shades = [name for name in named if re.fullmatch(r"(shade|gain|loss)-\d", name)]
    assert len(shades) == 15
    pairs = [("ink", each, TEXT) for each in (*grounds, *shades)]
    pairs += [(name, each, TEXT) for name in ("muted", "accent") for each in ("ground", "surface", "raised")]
    pairs += [("danger", each, TEXT) for each in ("surface", "danger-soft")] + [("on-accent", "accent", TEXT)]
    seen = ("edge", "focus", *(name for name in named if name.startswith("series-")))
    pairs += [(name, each, 3.0) for name in seen for each in ("ground", "surface")]
    low = [
        f"{ink} on {ground}: {contrast(named[ink], named[ground]):.2f}"
        for ink, ground, least in pairs
        if contrast(named[ink], named[ground]) < least
    ]
    assert low == []
