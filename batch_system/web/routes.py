"""The routes of the HTTP API, made from the verbs; and what surrounds each of them: who asks, which
role it needs, and which query parameters are refused.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from functools import cache
from inspect import Parameter, Signature
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from fastapi.security import APIKeyCookie, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.responses import Response

from batch_system.concurrency.offload import offload
from batch_system.operations.asking.actor import Actor, Role, refuse_lower_role
from batch_system.operations.asking.context import Performs
from batch_system.operations.operations import Operations
from batch_system.verbs.verb import (
    Http,
    Verb,
    all_verbs,
    answer_of,
    description_of,
    name_of,
    paragraphs_of,
)
from batch_system.web.access import Guard
from batch_system.web.problems import MEDIA_TYPE

BEARER = HTTPBearer(auto_error=False, description="A token, as `batch token create` makes it.")
COOKIE = APIKeyCookie(
    name="batch_session", auto_error=False, description="The session of a person."
)

V1 = "/api/v1"
"""Where the routes stand."""


class Body(BaseModel):
    """The base of all bodies of requests: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


def guard_of(request: Request) -> Guard:
    """The guard of the service. Raises BatchError if the service has not started."""
    guard: Guard = request.app.guard
    return guard


class AskedFirst(APIRoute):
    """A route that identifies the caller before it reads the body, so that callers without a token
    can't make it wait for one.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The function that answers a request."""
        answer = super().get_route_handler()

        async def answer_caller(request: Request) -> Response:
            request.state.actor = await guard_of(request).actor(request)
            return await answer(request)

        return answer_caller


def caller(role: Role) -> Callable[..., Coroutine[Any, Any, Operations]]:
    """A dependency: the operations by the actor of the request, who must have this role."""

    async def operations_by_actor(
        request: Request,
        bearer: Annotated[Any, Security(BEARER)],
        cookie: Annotated[Any, Security(COOKIE)],
    ) -> Operations:
        actor: Actor = request.state.actor
        refuse_lower_role(actor, role)
        refuse_unknown_query(request)
        return guard_of(request).operations.by(actor)

    return operations_by_actor


Viewer = Annotated[Operations, Depends(caller("viewer"))]


def refuse_unknown_query(request: Request) -> None:
    """Raises RequestValidationError for query parameters that the document of the API does not
    have.
    """
    if not request.query_params:
        return
    # Before FastAPI 0.165, the path of a route has the prefix of its router.
    path_format = request.scope["route"].path_format.removeprefix(V1)
    path = request.app.openapi()["paths"][V1 + path_format][request.method.lower()]
    known = {
        parameter["name"] for parameter in path.get("parameters", []) if parameter["in"] == "query"
    }
    if unknown := sorted(set(request.query_params) - known):
        allowed = f"allowed: {', '.join(sorted(known))}" if known else "none is allowed here"
        errors = [
            {"type": "extra_forbidden", "loc": ("query", name), "msg": f"unknown; {allowed}"}
            for name in unknown
        ]
        raise RequestValidationError(errors)


_DETAILS = {"content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}}

PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request is not as this document says.", **_DETAILS},
    401: {"description": "A token or a sign-in is needed.", **_DETAILS},
    403: {
        "description": "The role of the caller does not allow this, or the request is forged.",
        **_DETAILS,
    },
    404: {"description": "There is no such thing.", **_DETAILS},
    409: {"description": "The present state does not allow this.", **_DETAILS},
    413: {"description": "The body is too large.", **_DETAILS},
    421: {"description": "The Host header is not allowed.", **_DETAILS},
    405: {"description": "The method is not allowed.", **_DETAILS},
    422: {
        "description": "A value can't be used, such as a parameter that the task does not take.",
        **_DETAILS,
    },
    429: {"description": "Too many requests.", **_DETAILS},
    500: {"description": "Stored data is damaged, or the service failed.", **_DETAILS},
    503: {"description": "A database or a place does not answer.", **_DETAILS},
}


def router(tag: str) -> APIRouter:
    """A router for the requests under one heading."""
    return APIRouter(prefix=V1, tags=[tag], responses=PROBLEMS, route_class=AskedFirst)


@cache
def made_from_verbs() -> APIRouter:
    """The routes of all verbs that can be asked over HTTP. An address without names in braces comes
    first, because otherwise one with names would match its requests.

    They are made once in a process, for all its applications.
    """
    made = APIRouter(prefix=V1, responses=PROBLEMS, route_class=AskedFirst)
    asked = [(verb, http) for verb in all_verbs() if (http := verb.doors.http) is not None]
    for verb, http in sorted(asked, key=lambda each: _stands_for_values(each[1].path)):
        _add(made, verb, http)
    return made


def _stands_for_values(path: str) -> list[bool]:
    """For each part of the address, whether it stands for a value."""
    return [part.startswith("{") for part in path.split("/")]


def _add(made: APIRouter, verb: type[Verb], http: Http) -> None:
    responses: dict[int | str, dict[str, Any]] = {}
    if http.passing is not None:
        responses[304] = {"description": "The answer is the one that the caller has."}
    if http.text is not None:
        responses[200] = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    name = name_of(verb)
    made.add_api_route(
        http.path,
        _endpoint(verb, http),
        methods=[http.method],
        name=name,
        operation_id=name,
        status_code=http.status,
        tags=[http.tag or http.path.split("/")[1]],
        description="\n\n".join(filter(None, [*paragraphs_of(verb), http.about])),
        response_model=answer_of(verb),
        responses=responses,
    )


def _endpoint(verb: type[Verb], http: Http) -> Callable[..., Coroutine[Any, Any, Any]]:
    """The function that answers a request: FastAPI reads the fields of a request from its
    signature.
    """
    sent = [name for name in verb.model_fields if name not in (*http.in_path, *http.headers)]
    body = _body(verb, sent) if http.method == "POST" and sent else None

    async def answer(
        request: Request, response: Response, operations: Operations, **given: Any
    ) -> Any:
        sent_body = given.pop("body", None)
        known = given.pop("known", None)
        if sent_body is not None:
            given |= {name: getattr(sent_body, name) for name in sent_body.model_fields_set}
        found = await operations(cast(Performs[Any], verb(**given)))
        if http.revokes:
            guard_of(request).forget()
        if http.text is not None and request.headers.get("accept", "").startswith("text/plain"):
            return StreamingResponse(
                _one_by_one(http.text(found)), media_type="text/plain; charset=utf-8"
            )
        if http.passing is not None:
            tag = await offload(_tag_of, found, http.passing)
            if known == tag:
                return Response(status_code=304, headers={"etag": tag})
            response.headers["etag"] = tag
        return found

    parameters = [
        _parameter("request", Request),
        _parameter("response", Response),
        _parameter("operations", Annotated[Operations, Depends(caller(verb.doors.role))]),
        *(_of_field(verb, name, None, Path) for name in http.in_path),
        *(_of_field(verb, *each, Header) for each in http.headers.items()),
    ]
    if http.passing is not None:
        known = Annotated[str | None, Header(alias="If-None-Match", max_length=100)]
        parameters.append(_parameter("known", known, None))
    if body is not None:
        needed = any(info.is_required() for info in body.model_fields.values())
        empty = Parameter.empty if needed else None
        parameters.append(_parameter("body", body if needed else body | None, empty))
    elif http.method != "POST":
        parameters += [_of_field(verb, name, http.query.get(name), Query) for name in sent]
    vars(answer)["__signature__"] = Signature(parameters)
    return answer


def _parameter(name: str, annotation: Any, default: Any = Parameter.empty) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _of_field(
    verb: type[Verb], name: str, alias: str | None, place: Callable[..., Any]
) -> Parameter:
    """The parameter for a field of a verb. `place`: where a request has it, under the name `alias`
    if that differs.
    """
    info = verb.model_fields[name]
    sent = place(description=description_of(info), **({"alias": alias} if alias else {}))
    annotation = operator.getitem(Annotated, (info.annotation, *info.metadata, sent))
    default = Parameter.empty if info.is_required() else info.get_default()
    return _parameter(name, annotation, default)


def _body(verb: type[Verb], names: Sequence[str]) -> type[Body]:
    """The model of what a request sends in its body."""
    fields: dict[str, Any] = {}
    for name in names:
        info = verb.model_fields[name]
        described = Field(description=description_of(info))
        fields[name] = operator.getitem(Annotated, (info.annotation, info, described))
    return create_model(
        verb.__name__, __base__=Body, __doc__=paragraphs_of(verb)[0], __module__=__name__, **fields
    )


async def _one_by_one(lines: Iterator[str]) -> AsyncIterator[str]:
    for line in lines:
        yield line


def _tag_of(answer: Any, passing: Any) -> str:
    facts = answer.model_dump_json(exclude=passing)
    return f'"{hashlib.sha256(facts.encode()).hexdigest()[:32]}"'
