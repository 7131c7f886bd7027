"""What all resources need: the operations by the actor of the request, roles, and query parameters
that are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import APIKeyCookie, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from starlette.responses import Response

from service.operations.asking.actor import Actor, Role
from service.operations.asking.filter import TASK_NAME, TEXT
from service.operations.incidents.notes import LONGEST_NOTE, SHORTEST_NOTE
from service.operations.operations import Operations
from service.web.access import Guard, needs
from service.web.problems import MEDIA_TYPE

BEARER = HTTPBearer(auto_error=False, description="A token, as `batch token create` makes it.")
COOKIE = APIKeyCookie(
    name="batch_session", auto_error=False, description="The session of a person."
)

V1 = "/api/v1"
"""Where the resources stand."""
GIVEN = r"^[A-Za-z0-9_.-]{1,100}$"
BACKUP = r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}$"

TaskName = Annotated[str, Path(pattern=TASK_NAME, description="The name of the task.")]
GivenRun = Annotated[
    str,
    Path(
        pattern=GIVEN,
        description="The id of the run, at least six digits of its beginning or end, "
        "or a task: its newest run.",
    ),
]
BackupName = Annotated[
    str, Path(pattern=BACKUP, description="The name of the backup, or `latest`.")
]
Note = Annotated[str, StringConstraints(max_length=2_000, pattern=TEXT)] | None
NeededNote = Annotated[
    str,
    StringConstraints(
        min_length=SHORTEST_NOTE,
        max_length=LONGEST_NOTE,
        pattern=r"^\s*[^\s\x00][^\x00]+[^\s\x00]\s*$",
    ),
]
"""A note of at least three characters, without those blanks that stand at its ends."""


class Body(BaseModel):
    """The base of all bodies of requests: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class WithNote(Body):
    """A change, with the reason for it."""

    note: Note = Field(None, description="Why. It is recorded with the change.")


def guard_of(request: Request) -> Guard:
    """The guard of the service. Raises BatchError if the service has not started."""
    guard: Guard = request.app.guard
    return guard


class AskedFirst(APIRoute):
    """A route that knows who asks before it reads the body: nobody without a token makes it wait
    for one.
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
        needs(actor, role)
        refuse_unknown_query(request)
        return guard_of(request).operations.by(actor)

    return operations_by_actor


Viewer = Annotated[Operations, Depends(caller("viewer"))]
Operator = Annotated[Operations, Depends(caller("operator"))]
Admin = Annotated[Operations, Depends(caller("admin"))]


def refuse_unknown_query(request: Request) -> None:
    """Raises RequestValidationError for query parameters that the document of the API does not
    have.
    """
    if not request.query_params:
        return
    path = request.app.openapi()["paths"][V1 + request.scope["route"].path_format][
        request.method.lower()
    ]
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
    """A router for resources of one kind, which somebody with a role may ask for."""
    return APIRouter(tags=[tag], responses=PROBLEMS, route_class=AskedFirst)
