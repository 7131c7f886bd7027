"""Refuses changes that a page of another site could make with a browser's cookies."""

from __future__ import annotations

import hashlib
import hmac
import secrets

from starlette.requests import Request

from batch_system.web.problems import Refused

CHANGES = {"POST", "PUT", "PATCH", "DELETE"}


def csrf_of(cookie: str) -> str:
    """The CSRF token of a session, which its pages send with each change."""
    return hashlib.sha256(f"csrf {cookie}".encode()).hexdigest()


def masked(csrf: str) -> str:
    """The CSRF token for a form, a different one each time, so that the size of a compressed page
    reveals nothing about it.
    """
    nonce = secrets.token_hex(16)
    return nonce + hmac.new(csrf.encode(), nonce.encode(), hashlib.sha256).hexdigest()


def _unmasked(given: str, csrf: str) -> str:
    """`csrf`, if `masked` made `given` from it; otherwise an empty text."""
    nonce, proof = given[:32], given[32:]
    made = hmac.new(csrf.encode(), nonce.encode(), hashlib.sha256).hexdigest()
    return csrf if hmac.compare_digest(proof.encode(), made.encode()) else ""


def refuse_foreign(request: Request) -> None:
    """Refuse a change that a page of another site makes with a browser's cookies. Raises
    Refused.
    """
    if request.method not in CHANGES:
        return
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        raise Refused(403, "a page of another site may not make changes here")
    if origin is not None and origin != f"{request.url.scheme}://{request.headers.get('host', '')}":
        raise Refused(403, "the Origin of this request is another site")


def refuse_foreign_read(request: Request) -> None:
    """Refuse requests by which a page of another site reads or embeds ours; links to our pages
    work. Raises Refused.
    """
    site, mode = (request.headers.get(f"sec-fetch-{name}") for name in ("site", "mode"))
    if site not in (None, "same-origin", "none") and not (
        mode == "navigate" and request.method == "GET"
    ):
        raise Refused(403, "a page of another site may not read this")


def refuse_without_csrf(request: Request, cookie: str, csrf: str | None) -> None:
    """Refuse a change by a session that does not come from a page of ours. Raises Refused."""
    expected = csrf_of(cookie)
    given = request.headers.get("x-csrf-token", "") if csrf is None else _unmasked(csrf, expected)
    if request.method in CHANGES and not hmac.compare_digest(given.encode(), expected.encode()):
        raise Refused(403, "the X-CSRF-Token is missing or wrong: GET /api/v1/session tells it")
