"""Who sends a request, and whether this server takes it: hosts, keys and rates, before the body is read."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Final
from urllib.parse import urlsplit

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from meristem.errors import HostRefused, KeyRefused, MeristemError, NotAllowed, RateExceeded
from meristem.serve.failures import MOST_BYTES, failure_of
from meristem.serve.keys import Keys

LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
METRICS: Final = "/metrics"
MOST_REMEMBERED: Final = 10_000
"""Keys and addresses whose rates are remembered; those that were not seen for longest are forgotten first."""


@dataclass(frozen=True)
class Caller:
    """Who sends a request. owner: of the sessions that it may use; "" on a server without keys."""

    owner: str = ""


class Rates:
    """How many requests each name may still send: ``per_minute`` at once, and as many again evenly over a minute.

    It is in this process alone. For one thread at a time. clock: gives seconds.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str) -> None:
        """Count a request. RateExceeded where there were too many."""
        now = self._clock()
        left, then = self._left.pop(name, (self.per_minute, now))
        left = min(self.per_minute, left + (now - then) * self.per_minute / 60)
        self._left[name] = (max(left - 1, 0.0) if left >= 1 else left), now
        if len(self._left) > MOST_REMEMBERED:
            self._left.popitem(last=False)
        if left < 1:
            raise RateExceeded(
                f"more than {self.per_minute:g} requests a minute. Send fewer.",
                retry_after_s=math.ceil(round((1 - left) * 60 / self.per_minute, 3)),
            )


@dataclass(frozen=True)
class Access:
    """What this server takes from whom.

    keys: None where there are none and everybody is the owner "". hosts: names by which requests may call this server,
    so that no page of another site, whose name was made to lead here, can use a browser to get in; None for any, which
    keys make safe, since no browser sends them by itself. max_bytes: of the body of a request.
    """

    keys: Keys | None = None
    rates: Rates | None = None
    hosts: frozenset[str] | None = field(default_factory=lambda: frozenset(LOOPBACK))
    max_bytes: int = MOST_BYTES

    @property
    def has_keys(self) -> bool:
        """Whether requests need one."""
        return self.keys is not None and self.keys.are_required

    def caller(self, path: str, headers: Headers, address: str) -> Caller:
        """Who sends a request to a path, from an address. AccessError where it is not taken."""
        self._require_host(headers)
        if not _is_guarded(path):
            return Caller()
        try:
            caller = self._holder(path, headers)
        except KeyRefused:
            if self.rates:
                self.rates.take(f"address {address}")
            raise
        if self.rates:
            self.rates.take(f"key {caller.owner}" if caller.owner else f"address {address}")
        return caller

    def _holder(self, path: str, headers: Headers) -> Caller:
        if self.keys is None or not self.has_keys:
            return Caller()
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            raise KeyRefused("this server needs a key. Send `Authorization: Bearer KEY`.")
        found = self.keys.check(key.strip())
        wanted = "metrics" if path == METRICS else "sessions"
        if found.opens != wanted:
            raise NotAllowed(f"the key '{found.name}' opens {found.opens}, not {wanted}. Use another.")
        return Caller(found.name)

    def _require_host(self, headers: Headers) -> None:
        if self.hosts is None:
            return
        host = _name(f"//{headers.get('host', '')}")
        if host not in self.hosts:
            raise HostRefused(
                f"this server is not called '{host[:100]}'. Start it with --allowed-host if it is to be.",
                host=host[:100],
            )
        origin = headers.get("origin")
        if origin is not None and _name(origin) not in self.hosts:
            raise NotAllowed(f"pages of '{origin[:100]}' may not send requests to this server.")


class Guard:
    """Lets through what is taken, with its ``Caller`` in the state of the request; the rest is answered here."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            address = (scope.get("client") or ("", 0))[0]
            try:
                caller = self.access.caller(scope["path"], Headers(scope=scope), address)
            except MeristemError as error:
                await failure_of(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["caller"] = caller
        await self.app(scope, receive, send)


async def _caller(
    request: Request,
    key: Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False, scheme_name="key"))],
) -> Caller:
    """``key`` is here for the published description alone: ``Guard`` has read it before the body."""
    caller = getattr(request.state, "caller", None)
    if not isinstance(caller, Caller):
        raise KeyRefused("no key was read on the way to this request. This is a fault of meristem.")
    return caller


Asking = Annotated[Caller, Security(_caller)]
"""The argument of a route that touches sessions: who sends the request."""


def _is_guarded(path: str) -> bool:
    """Whether a path is for those who have a key: all but health, the page and the description of the API."""
    return path == METRICS or path == "/v1" or path.startswith("/v1/")


def _name(url: str) -> str:
    """The host that a URL names, without its port; "" where it names none."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""
