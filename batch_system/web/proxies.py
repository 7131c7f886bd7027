"""Reverse proxies: what they say about the client is believed only if their own address is in
BATCH_TRUSTED_PROXIES.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from batch_system.errors import InvalidSetting

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
PEER = "batch.peer"
"""The key of the scope for the address from which the connection comes, which may be that of a
proxy.
"""
OF_PROXIES = (
    "forwarded",
    "via",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-real-ip",
)
"""Headers that proxies add to a request."""
UNKNOWN = "unknown"
"""The address of a client whose trusted proxy does not give it in a readable form."""
MOST_HOPS = 50


def networks_of(setting: str) -> list[Network]:
    """The networks in BATCH_TRUSTED_PROXIES. Raises InvalidSetting."""
    try:
        return [ipaddress.ip_network(part.strip()) for part in setting.split(",") if part.strip()]
    except ValueError as error:
        raise InvalidSetting(
            f"setting BATCH_TRUSTED_PROXIES: {error}; allowed: addresses or networks"
        ) from None


def is_in(address: str | None, networks: Sequence[Network]) -> bool:
    """Whether an address is in one of these networks."""
    try:
        parsed = ipaddress.ip_address(address or "")
    except ValueError:
        return False
    return any(parsed in network for network in networks)


class Forwarded:
    """Takes the client's address and scheme from X-Forwarded-For and X-Forwarded-Proto of a trusted
    proxy.
    """

    def __init__(self, app: ASGIApp, networks: Callable[[], Sequence[Network]]) -> None:
        self._app = app
        self._networks = networks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            peer = scope["client"][0] if scope.get("client") else None
            scope = {**scope, PEER: peer}
            networks = self._networks()
            if networks and is_in(peer, networks):
                scope |= _of_client(Headers(scope=scope), networks)
        await self._app(scope, receive, send)


def _of_client(headers: Headers, networks: Sequence[Network]) -> dict[str, object]:
    """The values of the scope that the headers of a trusted proxy change."""
    changed: dict[str, object] = {}
    scheme = headers.get("x-forwarded-proto", "").rpartition(",")[2].strip().lower()
    if scheme in ("http", "https"):
        changed["scheme"] = scheme
    if "x-forwarded-for" not in headers:
        return changed
    hops = ",".join(headers.getlist("x-forwarded-for")).split(",")[-MOST_HOPS:]
    for hop in map(_address_in, reversed(hops)):
        changed["client"] = (hop or UNKNOWN, 0)
        if hop is None or not is_in(hop, networks):
            break
    return changed


def _address_in(hop: str) -> str | None:
    """The address in a part of X-Forwarded-For, which may have a port: `192.0.2.1:4711`,
    `[2001:db8::1]:4711`.
    """
    plain = re.fullmatch(
        r"\[([^]]*)\](?::\d+)?|(\d+\.\d+\.\d+\.\d+)(?::\d+)?|(.*)", hop.strip(), re.DOTALL
    )
    assert plain is not None
    try:
        return str(ipaddress.ip_address(next(filter(None, plain.groups()), "")))
    except ValueError:
        return None
