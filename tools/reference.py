"""The pages of the reference that are made from the code when the site is built: every command
with its options, every resource and field of the HTTP API, every setting, every metric, every
error, and every name that authors import.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer.main
from typer.core import TyperArgument, TyperGroup, TyperOption

MADE = "This page is made from the code."
EXAMPLES = Path(__file__).parent / "api_examples.md"
EXAMPLE = Path(__file__).parent.parent / ".env.example"
V1 = "/api/v1"
CHECKS = {
    "gt": "more than",
    "ge": "at least",
    "lt": "less than",
    "le": "at most",
}


def commands() -> str:
    from batch_system.cli import cli

    batch = typer.main.get_command(cli)
    about = f"{MADE} [Commands](../cli.md) explains what they do, with examples of their output."
    return "\n\n".join(["# All commands and options", about, *_command(batch, "batch")])


def _command(command: Any, name: str) -> Iterator[str]:
    yield f"## {name}"
    yield _cell(command.help or "")
    named = (each for each in command.params if isinstance(each, TyperArgument | TyperOption))
    yield from _table(("option or argument", "what it is"), map(_parameter, named))
    if isinstance(command, TyperGroup):
        context = command.make_context(name, [], resilient_parsing=True)
        for each in command.list_commands(context):
            yield from _command(command.get_command(context, each), f"{name} {each}")


def _parameter(each: TyperArgument | TyperOption) -> tuple[str, str]:
    names = [*each.opts, *each.secondary_opts] if isinstance(each, TyperOption) else [each.name]
    return ", ".join(f"`{name}`" for name in names), each.help or ""


def api() -> str:
    from batch_system.app import create_app

    made: dict[str, Any] = create_app().openapi()  # type: ignore[attr-defined]
    parts = ["# All resources and fields", f"{MADE} [The HTTP API](../api.md) says how to use it."]
    for path, methods in sorted(made["paths"].items()):
        for method, operation in methods.items():
            parts += _operation(f"{method.upper()} {path}", operation)
    for name, schema in sorted(made["components"]["schemas"].items()):
        parts += _schema(name, schema)
    return "\n\n".join(parts)


@cache
def examples() -> dict[str, str]:
    """The sections of EXAMPLES by the resources that their headings name."""
    sections = EXAMPLES.read_text(encoding="utf-8").split("\n## ")[1:]
    return {name: text.strip() for name, _, text in (each.partition("\n") for each in sections)}


@cache
def roles() -> dict[str, str]:
    """The role that each resource needs, by its method and its path."""
    from batch_system.verbs.verb import all_verbs

    doors = [verb.doors for verb in all_verbs()]
    needed = {f"{each.http.method} {each.http.path}": each.role for each in doors if each.http}
    return {
        "GET /events": "viewer",
        "GET /session": "viewer",
        "DELETE /session": "viewer",
        **needed,
    }


def _operation(title: str, operation: dict[str, Any]) -> Iterator[str]:
    resource = title.replace(V1, "")
    yield f"## {title}"
    yield _cell(operation.get("description", operation.get("summary", "")))
    role = roles().get(resource)
    yield f"Needs the role {role}." if role else "Needs no role."
    given = operation.get("parameters", [])
    yield from _table(
        ("parameter", "where", "type", "what it is"),
        (
            (f"`{each['name']}`", each["in"], _type(each["schema"]), each.get("description", ""))
            for each in given
        ),
    )
    body = operation.get("requestBody")
    if body:
        yield f"The body: {_type(next(iter(body['content'].values()))['schema'])}"
    answers = {
        _type(content["schema"])
        for status, answer in operation["responses"].items()
        if status < "300"
        for content in answer.get("content", {}).values()
        if content.get("schema")
    }
    yield f"The answer: {', '.join(sorted(answers)) or 'nothing, or text'}"
    yield examples().get(resource, "[The HTTP API](../api.md) has an example.")


def _schema(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"## {name}"
    yield _cell(schema.get("description", ""))
    if "enum" in schema:
        yield "One of " + ", ".join(f"`{value}`" for value in schema["enum"]) + "."
    needed = schema.get("required", [])
    yield from _table(
        ("field", "type", "needed", "what it is"),
        (
            (f"`{field}`", _type(of), "yes" if field in needed else "", of.get("description", ""))
            for field, of in schema.get("properties", {}).items()
        ),
    )


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return " or ".join(_type(each) for each in schema[several])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return f"{schema.get('type', 'any value')} {schema.get('format', '')}".strip()


def settings() -> str:
    from batch_system.config import Settings

    rows = (
        (
            f"`{name}`",
            "empty" if field.default in (None, "") else f"`{field.default}`",
            ", ".join(_allowed(field.annotation, field.metadata)),
            _sentences()[name],
        )
        for name, field in Settings.model_fields.items()
    )
    about = f"{MADE} [Settings](../settings.md) says where they are set, and when they are read."
    table = _table(("setting", "default", "allowed", "what it is"), rows)
    return "\n\n".join(["# All settings", about, *table])


def _allowed(annotation: Any, checks: Iterable[Any]) -> Iterator[str]:
    """The bounds of a number, or the values of a choice."""
    yield from (f"`{value}`" for value in _choices(annotation))
    for check in checks:
        for bound, words in CHECKS.items():
            if getattr(check, bound, None) is not None:
                yield f"{words} {getattr(check, bound):.15g}"


def _choices(annotation: Any) -> tuple[str, ...]:
    if annotation is bool:
        return ("true", "false")
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(value for each in get_args(annotation) for value in _choices(each))


@cache
def _sentences() -> dict[str, str]:
    """What .env.example says of each setting."""
    text = EXAMPLE.read_text(encoding="utf-8")
    found = re.findall(r"((?:^# .*\n)+)^#([A-Z_]+)=", text, re.MULTILINE)
    return {name: re.sub(r"^# ", "", comment, flags=re.MULTILINE) for comment, name in found}


def metrics() -> str:
    from batch_system.web.exposition import families

    about = f"{MADE} [Monitoring](../monitoring.md) says how to scrape them, and what labels mean."
    parts = ["# All metrics", about]
    for title, found in zip(("Of the process", "Of the ledger"), families(), strict=True):
        rows = ((_with_labels(each), each.type, each.documentation) for each in found)
        parts += [f"## {title}", *_table(("metric", "type", "what it is"), rows)]
    return "\n\n".join(parts)


def _with_labels(metric: Any) -> str:
    name = f"{metric.name}_total" if metric.type == "counter" else metric.name
    labels = ",".join(metric._labelnames)
    return f"`{name}{{{labels}}}`" if labels else f"`{name}`"


def python() -> str:
    import batch_system
    from batch_system.testing import Batch

    about = f"{MADE} [Policies](../policies.md) and [runs](../runs.md) explain the most important."
    parts = ["# All names for authors", about]
    for name in batch_system.__all__:
        parts += _described(f"batch_system.{name}", getattr(batch_system, name))
    parts += _described("batch_system.testing.Batch", Batch)
    for name, member in vars(Batch).items():
        if not name.startswith("_") and inspect.getdoc(member):
            parts += _described(f"Batch.{name}", member, level="###")
    return "\n\n".join(parts)


def _described(title: str, member: Any, level: str = "##") -> Iterator[str]:
    yield f"{level} {title}"
    if inspect.isfunction(member):
        yield f"```python\n{member.__name__}{inspect.signature(member)}\n```"
    yield f"```text\n{inspect.getdoc(member)}\n```"


def errors() -> str:
    from batch_system import errors

    tree = inspect.cleandoc(errors.__doc__ or "")
    found = [
        error
        for _, error in inspect.getmembers(errors, inspect.isclass)
        if issubclass(error, BaseException)
    ]
    about = f"{MADE} [Runs](../runs.md#errors) says which of them an author meets, and why."
    parts = ["# All errors", about, f"```text\n{tree}\n```"]
    for error in found:
        parts += [f"## {error.__name__}", _cell(inspect.getdoc(error) or "")]
    return "\n\n".join(parts)


PAGES: dict[str, Callable[[], str]] = {
    "reference/commands.md": commands,
    "reference/api.md": api,
    "reference/settings.md": settings,
    "reference/metrics.md": metrics,
    "reference/python.md": python,
    "reference/errors.md": errors,
}


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    lines = [" | ".join(_cell(cell) for cell in row) for row in rows]
    if lines:
        ruled = [" | ".join(head), "|".join("---" for _ in head), *lines]
        yield "\n".join(f"| {line} |" for line in ruled)


def _cell(text: str) -> str:
    """In one line, without what Markdown would take for a column or for HTML."""
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|").replace("<", "&lt;")
