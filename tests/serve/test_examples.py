"""The examples of the pages, as a reader would run them: curl, and the client of OpenAI."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from serving import new_session, serving

ROOT = Path(__file__).parents[2]
ADDRESS = "localhost:8000"
EXAMPLE = re.compile(r"^curl (?:.*\\\n)*.*$|`(curl [^`]*)`", re.MULTILINE)
"""A line of a block, with those that it goes on in, or code inside a sentence."""


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("data")) as (url, served):
        served.name = "meristem"
        yield url


def commands(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [found[1] or found[0] for found in EXAMPLE.finditer(text)]


@pytest.mark.parametrize(("page", "n"), [("README.md", 1), ("docs/serving.md", 2)])
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_every_curl_on_the_pages_is_answered(url, page, n):
    import httpx2 as httpx

    found = commands(page)
    assert len(found) >= n
    with httpx.Client(base_url=url) as web:
        session = new_session(web)
    for command in found:
        line = command.replace(ADDRESS, url.removeprefix("http://")).replace('"ID"', f'"{session}"')
        done = subprocess.run(["sh", "-eu", "-c", line], capture_output=True, text=True, check=True)
        body = json.loads(done.stdout)
        assert "error" not in body, (command, body)
        assert body["object"] in ("session", "chat.completion")


def test_the_client_of_openai_runs_as_the_page_has_it(url, capsys):
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(from openai.*?)```", text, re.DOTALL)
    exec(compile(block.replace("http://127.0.0.1:8000", url), "serving.md", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")
