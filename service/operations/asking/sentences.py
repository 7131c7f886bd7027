"""Says in words what is wrong with the values that somebody has given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from service.escaping import echoed


def in_words(error: ValidationError, named: Callable[[str], str] = str) -> str:
    """One sentence for each value that is not allowed. `named`: how a field is called there."""
    return "; ".join(_sentence(problem, named) for problem in error.errors())


def _sentence(problem: Any, named: Callable[[str], str]) -> str:
    field = str(problem["loc"][0]) if problem["loc"] else ""
    if not field:
        return _message(problem)
    if problem["type"] == "missing":
        return f"{named(field)} is needed"
    return f"{named(field)} is {echoed(problem['input'])}: {_message(problem)}"


def _message(problem: Any) -> str:
    """What is allowed instead."""
    context = problem.get("ctx", {})
    match problem["type"]:
        case "enum" | "literal_error":
            allowed = str(context["expected"]).replace("'", "").replace(" or ", ", ")
            return f"allowed: {allowed}"
        case "string_too_long":
            return f"allowed are at most {context['max_length']:,} characters"
        case "string_too_short":
            return f"allowed are at least {context['min_length']:,} characters"
        case "too_long":
            return f"allowed are at most {context['max_length']:,}"
        case "greater_than_equal":
            return f"allowed: {context['ge']:,} or more"
        case "less_than_equal":
            return f"allowed: at most {context['le']:,}"
        case "string_pattern_mismatch":
            return f"allowed is a text like {context['pattern']}"
    return str(problem["msg"]).removeprefix("Value error, ")
