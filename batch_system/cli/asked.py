"""The options of commands, made from the fields of verbs, so that a field is said once.

    @asks("asked", "batch_system.verbs.runs:ListRuns", names={"created_since": "--since"})
    def runs(asked: ListRuns, exit_code: ExitCode = False, as_json: AsJson = False) -> None:

The command has an option for each field of ListRuns, and the function gets the verb. A verb is
imported when its command is built, so that `batch --help` imports none.
"""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import EnumType
from inspect import Parameter
from types import SimpleNamespace
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer

from batch_system import clock
from batch_system.cli import complete
from batch_system.cli.options import age, instant, instant_or_age, whole
from batch_system.errors import InvalidParameters

F = TypeVar("F", bound=Callable[..., None])

_INSTANTS = {
    "": "ISO 8601",
    "back": "ISO 8601, or an age such as 2h or 7d",
    "forward": "ISO 8601, or for how long, such as 2h or 3d",
}


@dataclass(frozen=True)
class Asked:
    """A model whose fields are options of a command.

    Attributes:
        parameter: The parameter of the function that gets the model.
        model: Where it is, as `module:Class`.
        names: The names used instead of `--field`. A name without dashes is an argument.
        without: The fields that the command does not have.
    """

    parameter: str
    model: str
    names: Mapping[str, str] = field(default_factory=dict)
    without: Collection[str] = ()

    def load(self) -> Any:
        """Import the model."""
        module, _, name = self.model.partition(":")
        return getattr(importlib.import_module(module), name)

    def name_of(self, field: str) -> str:
        """How a field is called in the command."""
        return self.names.get(field, f"--{field.replace('_', '-')}")


def asks(
    parameter: str,
    model: str,
    *,
    names: Mapping[str, str] | None = None,
    without: Collection[str] = (),
) -> Callable[[F], F]:
    """Give the function of a command the options of a model. Asked explains the arguments."""

    def mark(function: F) -> F:
        function.__dict__["asked"] = Asked(parameter, model, names or {}, without)
        return function

    return mark


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """The function of a command with an argument or option for each field that it asks."""
    asked: Asked | None = function.__dict__.get("asked")
    if asked is None:
        return function
    model = asked.load()
    options = {
        name: _Option(asked, model, name)
        for name in model.model_fields
        if name not in asked.without
    }
    own = [
        each.replace(kind=Parameter.KEYWORD_ONLY, annotation=_evaluated(each.annotation, function))
        for name, each in inspect.signature(function).parameters.items()
        if name != asked.parameter
    ]

    def command(**given: Any) -> None:
        typed = {name: given.pop(name) for name in options}
        values: dict[str, Any] = {}
        for name, value in typed.items():
            if value not in (None, [], ()):
                values[name] = options[name].read(value, values)
        function(**{asked.parameter: _checked(asked, model, values)}, **given)

    parameters = [*(option.parameter() for option in options.values()), *own]
    vars(command)["__signature__"] = inspect.Signature(sorted(parameters, key=_is_option))
    command.__doc__, command.__name__ = function.__doc__, function.__name__
    return command


def _evaluated(annotation: Any, function: Callable[..., None]) -> Any:
    """The annotation of a parameter, which is a text. The model's own annotation can't be
    evaluated.
    """
    holder = SimpleNamespace(__annotations__={"it": annotation})
    return typing.get_type_hints(holder, vars(inspect.getmodule(function)), include_extras=True)[
        "it"
    ]


def _is_option(parameter: Parameter) -> bool:
    """Arguments come first; their order, and that of the options, is kept."""
    places = getattr(parameter.annotation, "__metadata__", ())
    return not any(isinstance(place, typer.models.ArgumentInfo) for place in places)


def _checked(asked: Asked, model: Any, values: Mapping[str, Any]) -> Any:
    from pydantic import ValidationError

    from batch_system.operations.asking.sentences import in_words
    from batch_system.verbs.verb import NotAllowed

    try:
        return model(**values)
    except NotAllowed as error:
        raise error.named(asked.name_of) from None
    except ValidationError as error:
        raise InvalidParameters(in_words(error, model, asked.name_of)) from None


class _Option:
    """One field as an argument or option: how it is shown, and how its value is read."""

    def __init__(self, asked: Asked, model: Any, name: str) -> None:
        from pydantic import AwareDatetime

        from batch_system.operations.asking.filter import CountsFrom, Direction
        from batch_system.operations.asking.sentences import marks_of
        from batch_system.verbs.verb import description_of

        info = model.model_fields[name]
        marks = marks_of(info)
        self.asked = asked
        self.name = name
        self._ways = asked.name_of(name).split("/")
        self._about = description_of(info) or ""
        self._is_needed = info.is_required()
        self._default = info.get_default()
        type_ = _without_none(info.annotation)
        self._is_list = get_origin(type_) is list
        type_ = _without_none(get_args(type_)[0]) if self._is_list else type_
        self._is_flag = type_ is bool
        self._is_instant = type_ is AwareDatetime
        self._direction = next((m.value for m in marks if isinstance(m, Direction)), "")
        self._counts_from = next((m.field for m in marks if isinstance(m, CountsFrom)), "")
        self._choices = _choices(type_)
        bounds = {end: getattr(m, end) for m in marks for end in ("ge", "le") if hasattr(m, end)}
        self._bounds = (bounds["ge"], bounds["le"]) if type_ is int and len(bounds) == 2 else None

    def parameter(self) -> Parameter:
        """The parameter of the function that typer reads."""
        type_: Any = bool if self._is_flag else int if self._bounds is not None else str
        type_ = list[type_] if self._is_list or len(self._ways) > 1 else type_
        default: Any = Parameter.empty
        if not self._is_needed:
            default = self._default if self._is_flag or self._bounds is not None else None
            type_ = type_ if default is not None else type_ | None
        shown: dict[str, Any] = {"help": self._help()}
        if self.name in ("task", "name", "run"):
            shown["autocompletion"] = complete.task_names
        elif self._choices:
            shown["autocompletion"] = complete.one_of(self._choices)
        if self._bounds is not None:
            shown |= {"parser": whole(*self._bounds), "metavar": "NUMBER"}
        elif self._is_instant:
            shown["metavar"] = "TIME"
        if self._ways[0].startswith("-"):
            place: Any = typer.Option(*self._ways, **shown)
        else:
            place = typer.Argument(metavar=self._ways[0], **shown)
        annotation = Annotated[type_, place]
        return Parameter(self.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    def _help(self) -> str:
        about = re.sub(
            r"`([a-z_]+)`", lambda found: f"`{self.asked.name_of(found[1])}`", self._about
        )
        more = [_INSTANTS[self._direction]] if self._is_instant else []
        if not all(choice in about for choice in self._choices):
            more.append(", ".join(self._choices))
        if self._is_list:
            more.append("may be repeated")
        if not more:
            return about
        first, stop, others = about.partition(".")
        return f"{first} ({'; '.join(more)}){stop}{others}"

    def read(self, value: Any, others: Mapping[str, Any]) -> Any:
        """The value of the field for the text that the user has typed. `others`: the values of the
        fields before it. Raises InvalidParameters.
        """
        if not self._is_instant:
            return value
        name = self._ways[0]
        if isinstance(value, list):
            if len(value) > 1:
                raise InvalidParameters(f"give {' or '.join(self._ways)}, and only once")
            value = value[0]
        if self._direction == "back":
            return instant_or_age(value, name)
        if self._direction == "forward" and re.fullmatch(r"[0-9]+[a-z]", value):
            return (others.get(self._counts_from) or clock.now()) + age(value, name)
        more = ", or for how long, such as 12h or 90d" if self._direction == "forward" else ""
        return instant(value, name, age=more)


def _choices(type_: Any) -> list[str]:
    """The values that are allowed, if the type lists them."""
    if isinstance(type_, EnumType):
        members: dict[str, Any] = dict(type_.__members__)
        return [str(member) for member in members.values()]
    return [str(each) for each in get_args(type_)] if get_origin(type_) is Literal else []


def _without_none(annotation: Any) -> Any:
    """X for `X | None`, without its annotations."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) not in (list, Literal, Annotated) and len(parts) == 1:
        annotation = parts[0]
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
