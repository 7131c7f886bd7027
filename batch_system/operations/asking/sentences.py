"""Says in words what is wrong with the values that somebody has given."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from batch_system.escaping import echoed


class About(str):
    """What a field means by its type, if the field has no description of its own."""


class Allowed(str):
    """What a type allows, if a sentence of its own is clearer than one about its pattern."""


def marks_of(info: FieldInfo) -> list[Any]:
    """The annotations of a field's type. For `X | None`, the type is X."""
    inner = [getattr(part, "__metadata__", ()) for part in typing.get_args(info.annotation)]
    return [*info.metadata, *itertools.chain.from_iterable(inner)]


def in_words(
    error: ValidationError, model: type[BaseModel], named: Callable[[str], str] = str
) -> str:
    """One sentence for each value that `model` does not allow. `named`: how a field is called where
    it was given.
    """
    return "; ".join(_sentence(problem, model, named) for problem in error.errors())


def by_field(error: ValidationError, model: type[BaseModel]) -> dict[str, str]:
    """The same sentences, by the names of the fields; those of one field together."""
    found: dict[str, list[str]] = {}
    for problem in error.errors():
        if problem["loc"]:
            found.setdefault(str(problem["loc"][0]), []).append(_sentence(problem, model, str))
    return {field: "; ".join(sentences) for field, sentences in found.items()}


def _sentence(problem: Any, model: type[BaseModel], named: Callable[[str], str]) -> str:
    field = str(problem["loc"][0]) if problem["loc"] else ""
    if field not in model.model_fields:
        return f"{field}: {_allowed(problem)}" if field else _allowed(problem)
    marks = marks_of(model.model_fields[field])
    own = next((str(mark) for mark in marks if isinstance(mark, Allowed)), None)
    if problem["type"] == "missing":
        return f"{named(field)}: {own}" if own else f"{named(field)} is needed"
    words = own or _allowed(problem)
    if problem["type"] in _OF_LENGTH or not words.startswith("allowed"):
        return f"{named(field)}: {words}"
    return f"{named(field)} is {echoed(str(problem['input']))}; {words}"


_OF_LENGTH = ("string_too_long", "too_long", "too_short")
"""Messages about lengths do not repeat the value, which may be very long."""


def _allowed(problem: Any) -> str:
    """What is allowed instead."""
    context = problem.get("ctx", {})
    match problem["type"]:
        case "enum" | "literal_error":
            allowed = str(context["expected"]).replace("'", "").replace(" or ", ", ")
            return f"allowed: {allowed}"
        case "string_too_long":
            return f"allowed are {context['max_length']:,} characters"
        case "string_too_short":
            return f"allowed are at least {context['min_length']:,} characters"
        case "too_long":
            return f"allowed are {context['max_length']:,} of them"
        case "greater_than_equal":
            return f"allowed: {context['ge']:,} or more"
        case "less_than_equal":
            return f"allowed: at most {context['le']:,}"
        case "string_pattern_mismatch":
            return f"allowed: {context['pattern']}"
    return str(problem["msg"]).removeprefix("Value error, ")
