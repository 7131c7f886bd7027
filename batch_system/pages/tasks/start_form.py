"""The form that starts a run: a field for each parameter of the task, made from their JSON schema,
and all mistakes at once, each at its field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import uuid4
from zoneinfo import ZoneInfo

from starlette.requests import Request

from batch_system.errors import InvalidParameters
from batch_system.operations.starting import startable
from batch_system.operations.tasks.results import TaskDetails
from batch_system.pages.frame.answers import GoTo
from batch_system.pages.frame.forms import PARAMETER, local_instant_of, verb_of
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.redaction import MASK
from batch_system.verbs.run_changes import StartRun
from batch_system.verbs.tasks import ShowTask
from batch_system.verbs.verb import NotAllowed
from batch_system.web.problems import Refused

WHEN = "when"
LATER = "later"
TYPES = {
    "date": "date",
    "datetime": "datetime-local",
    "time": "time",
    "password": "password",
}
"""The inputs of HTML for kinds of fields; a number is a text, because a browser sends nothing where
it finds no number, and what was typed would be lost.
"""
WORDS = {
    "date": "date",
    "datetime": "date and time",
    "time": "time of day",
    "integer": "whole number",
    "decimal": "number",
    "checkbox": "yes or no",
    "text": "text",
    "json": "JSON",
}
_FORMATS = {"date": "date", "date-time": "datetime", "time": "time", "password": "password"}
_TYPES = {"integer": "integer", "number": "decimal", "boolean": "boolean", "string": "text"}
_MOST_CHOICES_SAID = 4
_SENT = "on"
"""What a browser sends for a checkbox that is checked."""
_NO_DEFAULT = object()


@dataclass(frozen=True)
class FormField:
    """A parameter as a form asks for it.

    `kind`: a word of WORDS, or select, lines (a list, one item in each line), password, or any.
    `choices`: what a select offers, as texts with their values. `default`: as a person types it;
    None: there is none, or it can't be shown. `value`: what was entered before.
    """

    name: str
    kind: str
    words: str
    is_needed: bool
    description: str
    hint: str
    default: str | None
    choices: Mapping[str, Any]
    is_checked: bool = False
    value: str = ""

    @property
    def field(self) -> str:
        """The name of the field in the form."""
        return f"{PARAMETER}{self.name}"

    @property
    def type(self) -> str:
        """The type of the input."""
        return TYPES.get(self.kind, "text")

    @property
    def is_whole(self) -> bool:
        """Whether it takes a line of its own."""
        return self.kind in ("lines", "json", "checkbox")


def fields_of_schema(schema: Mapping[str, Any] | None) -> list[FormField]:
    """What a form must ask for, from the JSON schema of a task's parameters."""
    properties = (schema or {}).get("properties")
    needed = (schema or {}).get("required") or []
    if not isinstance(properties, dict):
        return []
    of_types = (schema or {}).get("$defs")
    return [
        _field(name, described, name in needed, of_types)
        for name, described in properties.items()
        if isinstance(described, dict)
    ]


def _field(name: str, given: Mapping[str, Any], is_needed: bool, of_types: Any) -> FormField:
    described = _meant(given, of_types)
    default = given.get("default", _NO_DEFAULT)
    kind, choices = _kind_of(described, default, of_types)
    return FormField(
        name=name,
        kind=kind,
        words=_words(kind, choices, described, of_types),
        is_needed=is_needed,
        description=str(given.get("description") or described.get("description") or ""),
        hint=_hint(described),
        default=None if default is _NO_DEFAULT or default == MASK else _typed(default, kind),
        choices=choices,
        is_checked=kind == "checkbox" and default is True,
    )


def _meant(described: Mapping[str, Any], of_types: Any) -> Mapping[str, Any]:
    """What a schema says about a value that is not null, for types such as `date | None` or one
    with a name. Of `Decimal`, which takes a number or a text, the number is meant.
    """
    some = described.get("anyOf")
    if isinstance(some, list):
        others = [each for each in some if isinstance(each, dict) and each.get("type") != "null"]
        if len(others) == 1 or {each.get("type") for each in others} == {"number", "string"}:
            described = others[0]
    named = str(described.get("$ref", "")).removeprefix("#/$defs/")
    found = of_types.get(named) if isinstance(of_types, dict) else None
    return found if isinstance(found, dict) else described


def _kind_of(
    described: Mapping[str, Any], default: object, of_types: Any
) -> tuple[str, dict[str, Any]]:
    choices = described.get("enum", [described["const"]] if "const" in described else None)
    if isinstance(choices, list):
        return "select", {_as_text(each): each for each in choices}
    kind = str(described.get("type"))
    if kind == "boolean":  # a checkbox can't be left alone where there is no default
        is_plain = isinstance(default, bool)
        return ("checkbox", {}) if is_plain else ("select", {"yes": True, "no": False})
    if kind == "array" and isinstance(items := described.get("items"), dict):
        of_items, _ = _kind_of(_meant(items, of_types), _NO_DEFAULT, of_types)
        return ("json" if of_items in ("json", "lines", "any") else "lines"), {}
    if kind in ("array", "object") or "anyOf" in described:
        return "json", {}
    if kind == "string":
        return _FORMATS.get(str(described.get("format")), "text"), {}
    return _TYPES.get(kind, "any"), {}


def _words(
    kind: str, choices: Mapping[str, Any], described: Mapping[str, Any], of_types: Any
) -> str:
    """What the field takes, in a few words."""
    if kind == "select":
        names = list(choices)
        if len(names) > _MOST_CHOICES_SAID:
            return f"one of {len(names)}"
        return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    if kind == "lines":
        items = _meant(described["items"], of_types)
        of_items, _ = _kind_of(items, _NO_DEFAULT, of_types)
        return f"list of {WORDS.get(of_items, 'value')}s" if of_items in WORDS else "list"
    return WORDS.get(kind, "")


def _hint(described: Mapping[str, Any]) -> str:
    """The bounds of a value, as sentences."""
    said = (
        ("minimum", "At least {}."),
        ("exclusiveMinimum", "More than {}."),
        ("maximum", "At most {}."),
        ("exclusiveMaximum", "Less than {}."),
        ("minLength", "At least {} characters."),
        ("maxLength", "At most {} characters."),
    )
    sentences = [text.format(described[name]) for name, text in said if name in described]
    return " ".join(sentences)


def _typed(default: Any, kind: str) -> str:
    """A default as a person would type it; empty for none."""
    if default is None:
        return ""
    if kind == "lines" and isinstance(default, list):
        return "\n".join(map(_as_text, default))
    if isinstance(default, bool):
        return "yes" if default else "no"
    return _as_text(default)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


async def ask_to_start(request: Request, viewer: Viewer) -> str:
    """The form for a run by hand, with what was entered before, if it was sent with mistakes."""
    task = await viewer.operations(ShowTask(name=request.path_params["task"]))
    fields = _with_values(task, viewer)
    wrong = viewer.wrong
    wrongs = {wrong.field: wrong.words, **wrong.others} if wrong is not None else {}
    named = {each.field: (f"p-{each.name}", each.name) for each in fields}
    named |= {"at": ("f-at", "the instant"), "note": ("f-note", "the note")}
    named["priority"] = ("f-priority", "the priority")
    return await render(
        "start.html",
        **await shell_of(viewer, "tasks", f"Start {task.name}"),
        task=task,
        fields=fields,
        wrongs=wrongs,
        links=[named[field] for field in wrongs if field in named],
        besides=[words for field, words in wrongs.items() if field not in named],
        key=f"page {uuid4()}",
    )


def _with_values(task: TaskDetails, viewer: Viewer) -> list[FormField]:
    """The fields of the form with what was entered before, without what is secret."""
    redaction = viewer.operations.context.redaction
    fields = []
    for field in fields_of_schema(task.schema_of_parameters):
        entered = viewer.entered.get(field.field, "")
        is_secret = field.kind == "password" or redaction.is_secret(field.name)
        has_secret = is_secret or (entered[:1] in ("[", "{") and redaction.is_secret(entered))
        kind = "password" if is_secret and field.kind in ("text", "any") else field.kind
        is_checked = entered == _SENT if viewer.entered else field.is_checked
        value = "" if has_secret else entered
        fields.append(replace(field, kind=kind, value=value, is_checked=is_checked))
    return fields


async def start(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Queue a run. What is left empty is left out, so that the task's defaults count."""
    context = viewer.operations.context
    task = await viewer.operations(ShowTask(name=request.path_params["task"]))
    params = parameters_in(fields_of_schema(task.schema_of_parameters), fields, viewer.zone)
    mistakes: dict[str, str] = {}
    at: datetime | None = None
    try:
        at = _begin(fields, viewer)
    except Refused as error:
        mistakes["at"] = error.detail
    known = {"name": task.name, "parameters": params, "slot": None, "at": at}
    try:
        asked = verb_of(StartRun, fields, **known, key=fields.get("key") or None)
    except NotAllowed as error:
        mistakes |= error.fields
    if mistakes:
        found = {**await startable.mistakes_in(context, task.name, params), **mistakes}
        raise InvalidParameters("; ".join(found.values()), found)
    started = await viewer.operations(asked)
    return GoTo(f"/runs/{started.id}")


def parameters_in(
    asked: Sequence[FormField], fields: Mapping[str, str], zone: ZoneInfo
) -> dict[str, Any]:
    """What was entered, of which instants are in this zone. What can't be read as its kind stays a
    text, which the check of the task refuses.
    """
    params: dict[str, Any] = {}
    for field in asked:
        given = fields.get(field.field, "").strip()
        if field.kind == "checkbox":
            if (given == _SENT) is not field.is_checked:
                params[field.name] = given == _SENT
        elif given:
            params[field.name] = _value(field, given, zone)
    return params


def _value(field: FormField, given: str, zone: ZoneInfo) -> Any:
    if field.kind == "select":
        return field.choices.get(given, given)
    if field.kind == "lines":
        return [line.strip() for line in given.splitlines() if line.strip()]
    if field.kind == "datetime":
        try:
            local = datetime.fromisoformat(given)
        except ValueError:
            return given
        return (local.replace(tzinfo=zone) if local.tzinfo is None else local).isoformat()
    if field.kind == "json" or (field.kind == "any" and given[0] in "[{"):
        try:
            return json.loads(given)
        except (ValueError, RecursionError):
            return given
    return given


def _begin(fields: Mapping[str, str], viewer: Viewer) -> datetime | None:
    """When the run begins at the earliest; None: now. Raises Refused."""
    at = local_instant_of("at", fields, viewer.zone)
    when = fields.get(WHEN, LATER)
    if when == LATER and WHEN in fields and at is None:
        raise Refused(422, "at: enter an instant, or choose Now")
    if when != LATER and at is not None:
        raise Refused(422, "at: choose Later for this instant, or leave it empty")
    return at
