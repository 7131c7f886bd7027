"""The saved views of the list of runs: filters that a person has given a name. The browser keeps
them in a cookie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlencode

from starlette.requests import Request
from starlette.responses import Response

from batch_system.errors import InvalidParameters
from batch_system.pages.frame.preferences import Kept, answered
from batch_system.pages.runs.run_filter import address, given_in

VIEWS_COOKIE = "batch_views"
MOST, LONGEST_NAME, LONGEST_COOKIE = 8, 40, 3_000
"""A person has at most this many views; the longest name, and the longest cookie, in characters."""


class SavedView(NamedTuple):
    """A filter of the list of runs. `is_current`: the page shows it."""

    name: str
    address: str
    is_current: bool


def views_in(cookies: Mapping[str, str], given: Mapping[str, str]) -> list[SavedView]:
    """The views that the cookie names, which may hold anything. `given`: the filter of the page."""
    return [
        SavedView(name, address(filter), filter == dict(given))
        for name, filter in _saved(cookies.get(VIEWS_COOKIE, ""))
    ]


def _saved(cookie: str) -> Sequence[tuple[str, dict[str, str]]]:
    pairs = parse_qsl(unquote(cookie[:LONGEST_COOKIE]))[:MOST]
    return [(name[:LONGEST_NAME], given_in(dict(parse_qsl(query)))) for name, query in pairs]


async def save_view(request: Request) -> Response:
    """Keep the filter under a name, or forget the name, and show the runs of the filter. This needs
    no sign-in: it changes the browser alone.
    """
    return await answered(request, partial(_changed, request.cookies.get(VIEWS_COOKIE, "")))


def _changed(cookie: str, fields: Mapping[str, str]) -> Kept:
    name = fields.get("name", "").strip()
    filter = given_in(dict(parse_qsl(fields.get("view", "")[:LONGEST_COOKIE])))
    saved = dict(_saved(cookie))
    if "forget" in fields:
        saved.pop(name, None)
    else:
        _check(name, filter, saved)
        saved[name] = filter
    value = quote(urlencode([(each, urlencode(kept)) for each, kept in saved.items()]))
    if len(value) > LONGEST_COOKIE:
        raise InvalidParameters("view: forget another view first: the browser keeps no more")
    return Kept(address(filter), {VIEWS_COOKIE: value})


def _check(name: str, filter: Mapping[str, str], saved: Mapping[str, object]) -> None:
    if not 1 <= len(name) <= LONGEST_NAME or not name.isprintable():
        raise InvalidParameters(f"name: allowed are 1 to {LONGEST_NAME} characters")
    if not filter:
        raise InvalidParameters("view: allowed is a filter with at least one condition")
    if name not in saved and len(saved) >= MOST:
        raise InvalidParameters(f"view: there are {MOST} views at most: forget another one first")
