"""Answers each error of a request with problem details."""

from __future__ import annotations

from itertools import islice
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import compile_path

from batch_system.batch.tasks.parameters import OF_PARAMETERS
from batch_system.errors import BatchError, InvalidParameters
from batch_system.escaping import brief
from batch_system.logs import get_logger
from batch_system.web.problems import STATUSES, FieldError, Refused, problem

logger = get_logger("batch_system.batch")

MOST_ERRORS = 20


def handle_errors(app: FastAPI) -> None:
    """Answer every error of `app` with problem details."""
    app.add_exception_handler(BatchError, _of_batch)
    app.add_exception_handler(Refused, _of_refusal)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(Exception, _of_anything)


async def _of_batch(request: Request, error: Exception) -> Response:
    assert isinstance(error, BatchError)
    fields = error.fields if isinstance(error, InvalidParameters) else {}
    errors = [
        FieldError(
            field=brief(f"body.{place}" if place.startswith(OF_PARAMETERS) else place, 200),
            message=brief(sentence, 300),
        )
        for place, sentence in islice(fields.items(), MOST_ERRORS)
    ]
    return problem(STATUSES[error.kind], error.message, error.kind, errors)


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
    return FieldError(
        field=brief(place, 200), message=brief(error["msg"].removeprefix("Value error, "), 300)
    )


async def _of_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return problem(404, "there is nothing at this address", "not_found")
    if error.status_code == 405:
        allowed = ", ".join(_methods(request)) or (error.headers or {}).get("Allow", "")
        return problem(
            405,
            f"{request.method} is not allowed here; allowed: {allowed}",
            headers={"Allow": allowed},
        )
    return problem(error.status_code, str(error.detail), headers=error.headers)


def _methods(request: Request) -> list[str]:
    """The methods that the document of the API has for this path."""
    path = request.url.path.removeprefix(request.scope.get("root_path", ""))
    paths: dict[str, Any] = (
        request.app.openapi()["paths"] if isinstance(request.app, FastAPI) else {}
    )
    matching = [template for template in paths if compile_path(template)[0].match(path)]
    literal = min(matching, key=lambda template: template.count("{"), default=None)
    return sorted(method.upper() for method in paths[literal]) if literal is not None else []


async def _of_anything(request: Request, error: Exception) -> Response:
    logger.error(f"a request failed: {request.method} {request.url.path}", exc_info=error)
    return problem(500, "the service failed to answer; its log has the error", "damaged")
