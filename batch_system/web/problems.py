"""Errors as problem details (RFC 9457): one table maps the kinds of errors to HTTP statuses."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from batch_system.errors import ErrorKind
from batch_system.escaping import brief

MEDIA_TYPE = "application/problem+json"
LONGEST_DETAIL = 2_000
RETRY_SECONDS = 5

STATUSES: dict[ErrorKind, int] = {
    "not_found": 404,
    "invalid": 422,
    "conflict": 409,
    "forbidden": 403,
    "unavailable": 503,
    "damaged": 500,
    "too_many": 429,
}
TITLES = {
    400: "The request is not as the document of the API says",
    401: "Sign in, or send a token",
    403: "This is not allowed",
    404: "There is no such thing",
    405: "This method is not allowed here",
    409: "This does not fit the present state",
    413: "The body is too large",
    421: "This service is not called by that name",
    422: "The request has values that are not allowed",
    429: "Too many requests",
    500: "Something is wrong in the service",
    503: "The service can't answer now",
}
KINDS = {
    400: "invalid",
    401: "forbidden",
    405: "invalid",
    413: "invalid",
    421: "forbidden",
    429: "unavailable",
}


class FieldError(BaseModel):
    """What is wrong with one value. `field`: its place in the request, such as `query.limit`."""

    field: str
    message: str


class Problem(BaseModel):
    """An error, as RFC 9457 describes it. `kind` says what a program can do about it; `detail` is
    for people.
    """

    type: str = Field(
        description="`urn:batch-system:problem:` and the kind, which docs/api.md explains."
    )
    title: str
    status: int
    detail: str
    kind: str
    errors: list[FieldError] = Field([], description="The values that are not allowed.")


def problem(
    status: int,
    detail: str,
    kind: str | None = None,
    errors: list[FieldError] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The response for an error."""
    kind = (
        kind
        or KINDS.get(status)
        or next((k for k, s in STATUSES.items() if s == status), "invalid")
    )
    body = Problem(
        type=f"urn:batch-system:problem:{kind}",
        title=TITLES.get(status, "The request failed"),
        status=status,
        detail=brief(detail, LONGEST_DETAIL),
        kind=kind,
        errors=errors or [],
    )
    named = dict(headers or {})
    if status in (429, 503):
        named.setdefault("Retry-After", str(RETRY_SECONDS))
    if status == 401:
        named.setdefault("WWW-Authenticate", "Bearer")
    return JSONResponse(body.model_dump(), status, named, MEDIA_TYPE)


class Refused(Exception):
    """A request that is answered with a problem, raised before the request is known to be
    allowed.
    """

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers
