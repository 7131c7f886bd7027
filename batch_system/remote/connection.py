"""Sends requests to the HTTP API of a service, and checks its answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from batch_system.errors import BatchError, ErrorKind
from batch_system.escaping import brief

M = TypeVar("M", bound=BaseModel)

TIMEOUT_SECONDS = 30.0
LARGEST_ANSWER = 64_000_000
"""A larger answer is refused, in bytes: the service may be any program that listens there."""
LONGEST_DETAIL = 2_000


class ServiceUnreachable(BatchError):
    """The service does not answer, or another program answers at its address."""

    kind = "unavailable"


def _error(kind_: ErrorKind) -> type[BatchError]:
    return type(
        "ServiceError",
        (BatchError,),
        {"kind": kind_, "__doc__": "An error that the service has answered."},
    )


ERRORS: Mapping[str, type[BatchError]] = {
    kind: _error(kind)
    for kind in ("not_found", "invalid", "conflict", "unavailable", "damaged", "forbidden")
}


class Connection:
    """Sends requests to one service, and checks its answers."""

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self._client = client
        self._url = url

    async def send(self, method: str, model: type[M], path: str, **options: Any) -> M:
        """The answer to a request, as `model`. Raises BatchError."""
        try:
            async with self._client.stream(method, f"/api/v1{path}", **options) as answer:
                content = await self._read(answer)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServiceUnreachable(
                f"the service at {self._url} can't be reached: {_cause(error)}"
            ) from None
        if answer.status_code >= 300:
            raise self._refusal(answer, content)
        try:
            return model.model_validate_json(content)
        except ValidationError:
            raise ServiceUnreachable(
                f"what answers at {self._url} is not this version of the service: {path} is not a "
                f"{model.__name__}"
            ) from None

    async def _read(self, answer: httpx.Response) -> bytes:
        content = bytearray()
        async for chunk in answer.aiter_bytes():
            content += chunk
            if len(content) > LARGEST_ANSWER:
                raise ServiceUnreachable(
                    f"the answer of {self._url} has more than {LARGEST_ANSWER:,} bytes"
                )
        return bytes(content)

    def _refusal(self, answer: httpx.Response, content: bytes) -> BatchError:
        try:
            problem = _Problem.model_validate_json(content)
        except ValidationError:
            return ServiceUnreachable(
                f"what answers at {self._url} is not the service: status {answer.status_code}"
            )
        if answer.status_code == 401:
            return ERRORS["forbidden"](
                f"{self._url}: {brief(problem.detail, LONGEST_DETAIL)}; see --token-file"
            )
        return ERRORS.get(problem.kind, ServiceUnreachable)(brief(problem.detail, LONGEST_DETAIL))


class _Problem(BaseModel):
    detail: str
    kind: str


def _cause(error: Exception) -> str:
    return brief(str(error) or type(error).__name__, 300)
