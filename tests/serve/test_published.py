"""The description of the API that the server publishes, and requests that are made up from it."""

import contextlib

import httpx2 as httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from meristem.serve.access import Access
from meristem.serve.keys import Keys
from serving import new_session, serving

MOST_TOKENS = 4


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with keys: its address and the headers of an owner."""
    directory = tmp_path_factory.mktemp("published")
    keys = Keys(directory)
    key = keys.add("ada")
    with serving(directory, access=Access(keys, hosts=None, max_bytes=1 << 20)) as (url, _):
        yield url, {"Authorization": f"Bearer {key}"}


def test_the_description_says_what_is_needed(guarded):
    """Every route below /v1 that touches sessions takes the key, every one names the shape of its errors, and what is
    no JSON is described too."""
    paths = httpx.get(f"{guarded[0]}/openapi.json").json()
    assert paths["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in paths["paths"].items():
        for method, said in methods.items():
            assert said["responses"]["4XX"]["content"].keys() == {"application/json"}, (method, path)
            assert "422" not in said["responses"]
            is_guarded = "session" in path or "completions" in path
            assert said.get("security") == ([{"key": []}] if is_guarded else None), (method, path)
    sent = paths["paths"]["/v1/sessions/import"]["post"]["requestBody"]["content"]
    assert sent.keys() == {"application/octet-stream"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_request_that_the_description_allows_or_forbids_is_a_fault(guarded):
    """schemathesis makes them up for every operation: no answer is a 5xx, and every error has its shape."""
    import schemathesis

    url, headers = guarded
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    with httpx.Client(base_url=url, headers=headers, timeout=300) as client:
        for found in schema.get_all_operations():
            operation = found.ok()
            _try(operation, schemathesis.GenerationMode.POSITIVE, client, headers)
            # An operation that takes nothing can be given nothing wrong.
            with contextlib.suppress(Unsatisfiable):
                _try(operation, schemathesis.GenerationMode.NEGATIVE, client, headers)
    assert httpx.get(f"{url}/healthz").status_code == 200


def _try(operation, mode, client, headers):
    @settings(
        max_examples=25,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), is_there=st.booleans())
    def tried(case, is_there):
        if is_there and "session_id" in (case.path_parameters or {}):
            case.path_parameters["session_id"] = new_session(client)
        if isinstance(case.body, dict) and case.path.endswith(("completions", "generate")):
            # It is to be valid, not long.
            for name in ("max_tokens", "max_completion_tokens"):
                if case.body.get(name) is None and name == "max_tokens":
                    case.body[name] = MOST_TOKENS
                elif isinstance(case.body.get(name), int):
                    case.body[name] = min(case.body[name], MOST_TOKENS)
        answer = case.call(headers=headers, timeout=300)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"} and error["message"]

    tried()
