"""Keys, hosts and rates: what one key has is to every other as if it were not there."""

import sqlite3

import httpx2 as httpx
import openai
import pytest

from meristem.errors import KeyRefused, RateExceeded, WrongValue
from meristem.serve import sessions as store
from meristem.serve.access import Access, Rates
from meristem.serve.keys import Keys
from meristem.serve.sessions import Sessions
from serving import TOKENIZER, error_of, model_of, new_session, serving

NOBODYS = "0" * 32


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with keys, and one client for each of two owners."""
    directory = tmp_path_factory.mktemp("guarded")
    keys = Keys(directory)
    made = {name: keys.add(name) for name in ("ada", "bob")}
    made["prometheus"] = keys.add("prometheus", opens="metrics")
    with serving(directory, access=Access(keys, hosts=None, max_bytes=1 << 20)) as (url, served):
        clients = {name: client_of(url, key) for name, key in made.items()}
        yield url, served, made, clients
        for client in clients.values():
            client.close()


def client_of(url, key):
    return httpx.Client(base_url=url, timeout=60, headers={"authorization": f"Bearer {key}"})


def test_a_key_is_shown_once_and_stored_as_a_salted_hash(tmp_path):
    """Neither the file nor what is listed holds it, and two files that hold it would not show that they do."""
    keys = Keys(tmp_path)
    key = keys.add("ada")
    assert keys.check(key).name == "ada" and keys.check(key) == keys.records()[0]
    secret = key.rpartition("_")[2]
    assert len(bytes.fromhex(secret)) == 32
    keys.close()
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert secret.encode() not in stored and bytes.fromhex(secret) not in stored
    assert (tmp_path / "keys.sqlite").stat().st_mode & 0o077 == 0
    with sqlite3.connect(tmp_path / "keys.sqlite") as database:
        ((salt,),) = database.execute("SELECT salt FROM keys").fetchall()
    assert len(salt) == 16 and salt != bytes(16)


def test_a_revoked_name_is_given_again_on_purpose_alone(tmp_path):
    keys = Keys(tmp_path)
    first = keys.add("ada")
    with pytest.raises(WrongValue, match="has or had a key"):
        keys.add("ada")
    second = keys.add("ada", replaces=True)
    with pytest.raises(KeyRefused):
        keys.check(first)
    keys.revoke("ada")
    with pytest.raises(KeyRefused):
        keys.check(second)
    with pytest.raises(WrongValue, match="no key in force"):
        keys.revoke("ada")
    with pytest.raises(WrongValue, match="has or had a key"):
        keys.add("ada")
    assert keys.are_required, "revoking the last key opens the server to nobody"
    assert keys.check(keys.add("ada", replaces=True)).name == "ada"
    assert [each.revoked is None for each in keys.records()] == [False, False, True]
    for name in ("", "a/b", "a b", "x" * 65, "-x", "a\n"):
        with pytest.raises(WrongValue, match="is no name for a key"):
            keys.add(name)
    keys.close()


def test_every_wrong_key_is_refused_alike(guarded):
    """Whatever is wrong with it: the answer does not say, and the salted hash is computed for each."""
    url, _, made, _ = guarded
    right = made["ada"]
    prefix, key_id, secret = right.split("_")
    wrong = (
        "none",
        f"{prefix}_{key_id}_{'0' * 64}",
        f"{prefix}_{'0' * 16}_{secret}",
        right[:-1],
        right + "0",
        right.upper(),
        "\u2603".encode().decode("latin-1"),
    )
    answers = [
        httpx.get(f"{url}/v1/sessions", headers={"authorization": f"Bearer {key}".encode("latin-1")}) for key in wrong
    ]
    assert {error_of(answer, 401)["code"] for answer in answers} == {"invalid_api_key"}
    assert len({answer.text for answer in answers}) == 1
    assert all(answer.headers["www-authenticate"] == "Bearer" for answer in answers)
    for headers in ({}, {"authorization": right}, {"authorization": f"Basic {right}"}):
        error_of(httpx.get(f"{url}/v1/sessions", headers=headers), 401)
    assert httpx.get(f"{url}/v1/sessions", headers={"authorization": f"bearer {right}"}).status_code == 200


def test_every_route_but_health_needs_a_key(guarded):
    """Also those that somebody adds later."""
    url, _, _, _ = guarded
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    opens = set()
    for path, methods in paths.items():
        for method in methods:
            answer = httpx.request(method, url + path.replace("{session_id}", NOBODYS).replace("{name}", "small"))
            if answer.status_code != 401:
                opens.add(path)
    assert opens <= {"/healthz", "/readyz"} and len(paths) > 12
    assert httpx.get(f"{url}/readyz").status_code == 200


def test_a_body_is_not_read_before_its_key(guarded):
    """Whoever has no key cannot make the server hold 1 MB, not even for a while."""
    url, _, _, _ = guarded
    error_of(httpx.post(f"{url}/v1/completions", content=b" " * (1 << 21)), 401)


def test_the_official_client_takes_a_key(guarded):
    url, _, made, _ = guarded
    with openai.OpenAI(base_url=f"{url}/v1", api_key=made["ada"], max_retries=0) as client:
        assert client.completions.create(model="small", prompt="x", max_tokens=2).usage.completion_tokens == 2
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="not valid"):
            client.models.list()


def asked_of(client, session_id):
    """Everything that can be asked of a session: what answers."""
    at, said = f"/v1/sessions/{session_id}", {"messages": [{"role": "user", "content": "x"}], "session": session_id}
    return [
        *(client.get(f"{at}{what}") for what in ("", "/turns", "/memory", "/export")),
        client.post(f"{at}/feed", json={"text": "x"}),
        client.post(f"{at}/generate", json={"prompt": "x", "max_tokens": 1}),
        client.post(f"{at}/generate", json={"prompt": "x", "max_tokens": 1, "stream": True}),
        client.post(f"{at}/fork", json={}),
        client.post(f"{at}/rollback", json={"to": 0}),
        client.post(f"{at}/save", json={"label": "x"}),
        client.post("/v1/completions", json={"prompt": "x", "session": session_id}),
        client.post("/v1/chat/completions", json=said),
        client.delete(at),
    ]


@pytest.mark.parametrize("is_busy", [False, True])
def test_s6_a_foreign_session_is_as_absent_as_none(guarded, is_busy):
    """Status, headers and body are those of an id that nobody has, also while its owner writes to it; afterwards it is
    as it was."""
    _, served, _, clients = guarded
    ada, bob = clients["ada"], clients["bob"]
    session = new_session(ada, name="Ada")
    ada.post(f"/v1/sessions/{session}/feed", json={"text": "My name is Ada."})
    before = ada.get(f"/v1/sessions/{session}").json()
    if is_busy:
        with served.sessions.writing(session, "ada"):
            foreign = asked_of(bob, session)
    else:
        foreign = asked_of(bob, session)
    for theirs, nobodys in zip(foreign, asked_of(bob, NOBODYS), strict=True):
        assert error_of(theirs, 404)["code"] == "session_not_found"
        assert theirs.text.replace(session, NOBODYS) == nobodys.text
        assert [name for name, _ in theirs.headers.items()] == [name for name, _ in nobodys.headers.items()]
    assert [each["id"] for each in bob.get("/v1/sessions").json()["data"]] == []
    assert ada.get(f"/v1/sessions/{session}").json() == before
    assert ada.delete(f"/v1/sessions/{session}").status_code == 200


def test_a_foreign_id_touches_no_row(tmp_path):
    """What would take a time of its own is not done: the index begins with the owner, and its row is never read."""
    sessions = Sessions(tmp_path, model_of(1), TOKENIZER)
    queries = []
    read = sessions._database.read
    sessions._database.read = lambda query, values=(): queries.append((query, values)) or read(query, values)
    made = sessions.create(owner="ada")
    queries.clear()
    for owner in ("bob", ""):
        with pytest.raises(store.NoSession):
            sessions.get(made.id, owner)
    ((query, values), *_) = queries
    (plan,) = read(f"EXPLAIN QUERY PLAN {query}", values)
    assert "INDEX sessions_by_owner (owner=? AND model=? AND tokenizer=? AND id=?)" in plan["detail"]
    sessions.close()


def test_keys_come_and_go_while_the_server_runs(guarded):
    url, served, _, _ = guarded
    elsewhere = Keys(served.sessions.directory)
    key = elsewhere.add("eve")
    with client_of(url, key) as eve:
        session = new_session(eve)
        elsewhere.revoke("eve")
        error_of(eve.get(f"/v1/sessions/{session}"), 401)
    with client_of(url, elsewhere.add("eve", replaces=True)) as eve:
        assert eve.get(f"/v1/sessions/{session}").status_code == 200
    elsewhere.close()


def test_a_key_for_metrics_opens_nothing_else(guarded):
    _, _, _, clients = guarded
    assert error_of(clients["prometheus"].get("/v1/sessions"), 403)["code"] == "not_allowed"
    assert error_of(clients["ada"].get("/metrics"), 403)["code"] == "not_allowed"


def test_other_names_and_pages_of_other_sites_are_refused(tmp_path):
    """On a server without keys a browser would be a way in, by a name that its owner made to lead here."""
    with serving(tmp_path) as (url, _):
        port = httpx.URL(url).port
        for host in ("localhost", f"127.0.0.1:{port}", "[::1]", "LOCALHOST:1", "localhost."):
            assert httpx.get(f"{url}/v1/models", headers={"host": host}).status_code == 200, host
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1.evil.example",
            "[::1",
            "localhost@evil.example",
        ):
            answer = httpx.get(f"{url}/healthz", headers={"host": host})
            assert error_of(answer, 421)["code"] == "host_refused", host
        for origin, status in (("http://evil.example", 403), ("null", 403), (url, 201), ("http://localhost:3000", 201)):
            assert httpx.post(f"{url}/v1/sessions", json={}, headers={"origin": origin}).status_code == status, origin


def test_a_rate_is_kept_for_each_name():
    """A minute's worth at once, then evenly; one name does not use up the share of another."""
    now = [0.0]
    rates = Rates(3, lambda: now[0])
    for _ in range(3):
        rates.take("ada")
    with pytest.raises(RateExceeded) as refused:
        rates.take("ada")
    assert refused.value.fields["retry_after_s"] == 20
    rates.take("bob")
    now[0] = 19.0
    with pytest.raises(RateExceeded) as refused:
        rates.take("ada")
    assert refused.value.fields["retry_after_s"] == 1
    now[0] = 20.0
    rates.take("ada")
    now[0] = 1000.0
    for _ in range(3):
        rates.take("ada")
    with pytest.raises(RateExceeded):
        rates.take("ada")


def test_who_sends_too_many_requests_is_told_when_to_send_the_next(tmp_path):
    """Health is not counted, wrong keys are."""
    keys = Keys(tmp_path)
    key = keys.add("ada")
    with serving(tmp_path, access=Access(keys, Rates(2, lambda: 0.0), None)) as (url, _):
        with client_of(url, key) as ada:
            assert [ada.get("/v1/models").status_code for _ in range(3)] == [200, 200, 429]
            answer = ada.get("/v1/models")
            assert error_of(answer, 429)["code"] == "rate_limit_exceeded" and answer.headers["retry-after"] == "30"
            assert ada.get("/healthz").status_code == 200
        assert [httpx.get(f"{url}/v1/models").status_code for _ in range(3)] == [401, 401, 429]
