"""Verb: one thing that can be asked of the system, said once. All doors are made from it: its
route, its method of the client, its command and its form.

A verb is a class. Its fields are the input, `perform` answers it, and the class line says through
which doors it can be asked, and by whom:

    class PauseTask(Verb, role="operator", http=post("/tasks/{name}/pause"), audit="task.pause"):

A verb and its answer import no SQLAlchemy, so that a command's help and a client of the HTTP API
begin at once; `perform` imports the room that does the work.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from batch_system.errors import InvalidParameters
from batch_system.operations.asking.actor import Role
from batch_system.operations.asking.sentences import About, by_field, in_words, marks_of

Method = Literal["GET", "POST", "DELETE"]


@dataclass(frozen=True)
class Http:
    """How a verb is asked over HTTP.

    Attributes:
        path: Below /api/v1; the names in braces are fields of the verb.
        tag: The heading under which the API's document has it. Default: the first part of the path.
        headers: The fields that are sent in a header, by their names.
        query: The fields whose query parameter has another name.
        passing: The fields of the answer that change while nothing happens, as for pydantic's
            `exclude`. If it is set, the answer has an ETag, which is the hash of the other fields.
        text: Writes the answer as text for people, which a caller may ask for.
        revokes: Whether it may revoke a secret, which the process then forgets at once.
        about: A paragraph for the document of the API.
    """

    method: Method
    path: str
    status: int = 200
    tag: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    passing: Mapping[str, Any] | None = None
    text: Callable[[Any], Iterator[str]] | None = None
    revokes: bool = False
    about: str = ""

    @property
    def in_path(self) -> list[str]:
        """The names of the fields that stand in the path."""
        return re.findall(r"{(\w+)}", self.path)


def get(path: str, **more: Any) -> Http:
    """A question, which changes nothing."""
    return Http("GET", path, **more)


def post(path: str, **more: Any) -> Http:
    """A change."""
    return Http("POST", path, **more)


def delete(path: str, **more: Any) -> Http:
    """A change by which something is gone."""
    return Http("DELETE", path, **more)


@dataclass(frozen=True)
class Doors:
    """Through which doors a verb can be asked, and by whom.

    Attributes:
        role: The lowest role that may ask for it.
        audit: The event that a change adds to the audit.
    """

    role: Role
    http: Http | None = None
    audit: str | None = None


class NotAllowed(InvalidParameters):
    """A verb got values that it does not allow."""

    def __init__(self, verb: type[Verb], error: ValidationError) -> None:
        super().__init__(in_words(error, verb), by_field(error, verb))
        self.verb = verb
        self.error = error

    def named(self, name_of: Callable[[str], str]) -> InvalidParameters:
        """The same, with the names that the fields have where they were given."""
        return InvalidParameters(in_words(self.error, self.verb, name_of))


class Verb(BaseModel):
    """The base of all verbs. A field is what is asked; `perform` carries it out and answers."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
    doors: ClassVar[Doors]

    def __init_subclass__(
        cls,
        *,
        role: Role,
        http: Http | None = None,
        audit: str | None = None,
        **config: Any,
    ) -> None:
        super().__init_subclass__(**config)
        cls.doors = Doors(role, http, audit)
        if cls.__module__.startswith(f"{__package__}."):
            _KNOWN.append(cls)

    @model_validator(mode="wrap")
    @classmethod
    def _explained(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Say in words what is wrong with the values of the fields. Raises NotAllowed."""
        try:
            return handler(value)
        except ValidationError as error:
            raise NotAllowed(cls, error) from None

    @property
    def role_needed(self) -> Role:
        """The lowest role that may ask for it."""
        return self.doors.role


_KNOWN: list[type[Verb]] = []
MODULES = (
    "tasks",
    "calendars",
    "maintenance",
    "runs",
    "run_changes",
    "bulks",
    "incidents",
    "why",
    "slots",
    "night",
    "access",
    "system",
    "backups",
)
"""The modules of the verbs, in the order in which the document of the API has them."""


def all_verbs() -> list[type[Verb]]:
    """All verbs, in the order of MODULES."""
    import importlib

    for name in MODULES:
        importlib.import_module(f"{__package__}.{name}")
    places = {f"{__package__}.{name}": place for place, name in enumerate(MODULES)}
    return sorted(
        (verb for verb in _KNOWN if verb.__module__ in places),
        key=lambda verb: places[verb.__module__],
    )


def answer_of(verb: type[Verb]) -> Any:
    """The type of what a verb answers: the return type of its `perform`."""
    perform: Callable[..., Any] = getattr(verb, "perform")  # noqa: B009 — each verb has its own
    return getattr(sys.modules[verb.__module__], perform.__annotations__["return"])


def name_of(verb: type[Verb]) -> str:
    """The name of a verb for programs, such as `pause_task`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", verb.__name__).lower()


def paragraphs_of(verb: type[Verb]) -> list[str]:
    """The docstring of a verb, each paragraph in one line."""
    return [" ".join(each.split()) for each in inspect.cleandoc(verb.__doc__ or "").split("\n\n")]


def description_of(info: FieldInfo) -> str | None:
    """What a field means: its own text, or that of its type. Of `X | None` the type is X."""
    if info.description is not None:
        return info.description
    return next((str(each) for each in marks_of(info) if isinstance(each, About)), None)
