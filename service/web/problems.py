"""Errors as problem details (RFC 9457): one table maps the kinds of errors to HTTP statuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import compile_path

from service.errors import BatchError, ErrorKind
from service.escaping import brief
from service.logs import get_logger

logger = get_logger("service.batch")

MEDIA_TYPE = "application/problem+json"
MOST_ERRORS = 20
LONGEST_DETAIL = 2_000
RETRY_SECONDS = 5

STATUSES: dict[ErrorKind, int] = {
    "not_found": 404,
    "invalid": 422,
    "conflict": 409,
    "forbidden": 403,
    "unavailable": 503,
    "damaged": 500,
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
KINDS = {400: "invalid", 401: "forbidden", 405: "invalid", 413: "invalid", 421: "forbidden", 429: "unavailable"}


class FieldError(BaseModel):
    """What is wrong with one value. `field`: its place in the request, such as `query.limit`."""

    field: str
    message: str


class Problem(BaseModel):
    """An error, as RFC 9457 describes it. `kind` says what a program can do about it; `detail` is for people."""

    type: str = Field(description="`urn:batch-system:problem:` and the kind, which docs/api.md explains.")
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
    kind = kind or KINDS.get(status) or next((k for k, s in STATUSES.items() if s == status), "invalid")
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
    """A request that is answered with a problem, raised where the request is not yet known to be allowed."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers


def handle_errors(app: FastAPI) -> None:
    """Answer every error of `app` with problem details."""
    app.add_exception_handler(BatchError, _of_batch)
    app.add_exception_handler(Refused, _of_refusal)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(Exception, _of_anything)


async def _of_batch(request: Request, error: Exception) -> Response:
    assert isinstance(error, BatchError)
    return problem(STATUSES[error.kind], error.message, error.kind)


async def _of_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return problem(error.status, error.detail, headers=error.headers)


async def _of_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = [_field_error(each) for each in error.errors()[:MOST_ERRORS]]
    detail = "; ".join(f"{each.field}: {each.message}" for each in errors)
    return problem(400, detail, "invalid", errors)


def _field_error(error: Any) -> FieldError:
    place = ".".join(str(part) for part in error["loc"])
    return FieldError(field=brief(place, 200), message=brief(error["msg"].removeprefix("Value error, "), 300))


async def _of_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return problem(404, "there is nothing at this address", "not_found")
    if error.status_code == 405:
        allowed = ", ".join(_methods(request)) or (error.headers or {}).get("Allow", "")
        return problem(405, f"{request.method} is not allowed here; allowed: {allowed}", headers={"Allow": allowed})
    return problem(error.status_code, str(error.detail), headers=error.headers)


def _methods(request: Request) -> list[str]:
    """The methods that the document of the API has for this path."""
    path = request.url.path.removeprefix(request.scope.get("root_path", ""))
    paths: dict[str, Any] = request.app.openapi()["paths"] if isinstance(request.app, FastAPI) else {}
    matching = [template for template in paths if compile_path(template)[0].match(path)]
    literal = min(matching, key=lambda template: template.count("{"), default=None)
    return sorted(method.upper() for method in paths[literal]) if literal is not None else []


async def _of_anything(request: Request, error: Exception) -> Response:
    logger.error(f"a request failed: {request.method} {request.url.path}", exc_info=error)
    return problem(500, "the service failed to answer; its log has the error", "damaged")
