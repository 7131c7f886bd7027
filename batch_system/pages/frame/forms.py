"""Forms: what they send, and where they lead afterwards."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlsplit
from zoneinfo import ZoneInfo

from starlette.requests import ClientDisconnect, Request

from batch_system.batch.tasks.parameters import OF_PARAMETERS
from batch_system.errors import BatchError, InvalidParameters, UnknownPreview
from batch_system.escaping import echoed
from batch_system.verbs.verb import Verb
from batch_system.web.problems import Refused

V = TypeVar("V", bound=Verb)

LARGEST = 65_536
MOST_FIELDS = 200
CSRF = "csrf"
ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
LONGEST_INSTANT = 40
TYPED_FROM = 500
"""For more runs than this, the person must type their number."""


PARAMETER = "param-"
"""The name of a field that is a parameter of a task begins with it."""


class Wrong(NamedTuple):
    """What is wrong with a form that was sent. `field`: the name of the field; empty if it is not
    one of them.

    `others`: what is wrong with other fields, by their names.
    """

    field: str
    words: str
    others: Mapping[str, str] = MappingProxyType({})


def wrong_in(error: Refused | BatchError, fields: Collection[str]) -> Wrong | None:
    """What a person can correct in the form; None if the error is about something else.

    An error without fields is about the one with whose name its message begins.
    """
    if isinstance(error, Refused):
        words, is_mistake = error.detail, error.status in (400, 422)
    else:
        words, is_mistake = (
            error.message,
            error.kind == "invalid" or isinstance(error, UnknownPreview),
        )
    if not is_mistake:
        return None
    about = error.fields if isinstance(error, InvalidParameters) else {}
    found = {_field_of(place): sentence for place, sentence in about.items()}
    if found:
        first, *_ = found
        return Wrong(first, found.pop(first), found)
    said = (name for name in fields if words.startswith((f"{name}:", f"{name} ")))
    return Wrong(next(said, ""), words)


def _field_of(place: str) -> str:
    """The name of the field of a form for a value of a verb."""
    if place.startswith(OF_PARAMETERS):
        return f"{PARAMETER}{place.removeprefix(OF_PARAMETERS)}"
    return place


async def fields_of(request: Request) -> Mapping[str, str]:
    """The fields of a form; if several have the same name, the last one. Raises Refused for forms
    that none of our pages sends.
    """
    if not hasattr(request.state, "fields"):
        request.state.fields = await _read_fields(request)
    fields: Mapping[str, str] = request.state.fields
    return fields


async def csrf_in(request: Request) -> str:
    """The CSRF token that a form sends back; empty if there is none."""
    return (await fields_of(request)).get(CSRF, "")


async def _read_fields(request: Request) -> Mapping[str, str]:
    if (
        request.headers.get("content-type", "").partition(";")[0].strip()
        != "application/x-www-form-urlencoded"
    ):
        raise Refused(400, "allowed is the content of a form: application/x-www-form-urlencoded")
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > LARGEST:
                raise Refused(413, f"a form has {LARGEST:,} bytes at most")
    except ClientDisconnect:
        raise Refused(400, "the connection ended before the form was complete") from None
    try:
        pairs = parse_qsl(
            body.decode(), keep_blank_values=True, max_num_fields=MOST_FIELDS, errors="strict"
        )
    except ValueError:
        raise Refused(400, f"a form has {MOST_FIELDS} fields at most, in UTF-8") from None
    if any("\0" in value for _, value in pairs):
        raise Refused(422, "a field has the character NUL, which is not allowed")
    return {name: value.replace("\r\n", "\n") for name, value in pairs}


def whole_id(request: Request, what: str) -> str:
    """The id in the address. A part of an id is not allowed, because the form must change exactly
    what the page asked about.
    """
    given = str(request.path_params[what])
    if ID.fullmatch(given) is None:
        raise Refused(
            404, f"there is no {what} with the id {echoed(given)}; here it has to be whole"
        )
    return given


def preview_of(fields: Mapping[str, str]) -> str:
    """The id of the preview that a form sends back."""
    given = fields.get("preview", "")
    if ID.fullmatch(given) is None:
        raise Refused(422, "preview: allowed is the id that the page has shown")
    return given


def verb_of(verb: type[V], fields: Mapping[str, str], **known: Any) -> V:
    """The verb that a form asks. `known`: fields of the verb that are not read from the form. The
    others get what was entered. Raises NotAllowed.
    """
    entered = {
        name: text
        for name in verb.model_fields
        if name not in known and (text := fields.get(name, "").strip())
    }
    return verb(**entered, **known)


def instant_of(name: str, fields: Mapping[str, str]) -> datetime | None:
    """The instant that a form sends back as the page has written it; None if there is none."""
    if not (given := fields.get(name, "")):
        return None
    try:
        found = datetime.fromisoformat(given[:LONGEST_INSTANT])
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise Refused(422, f"{name}: allowed is the instant that the page has shown")
    return found


def local_instant_of(name: str, fields: Mapping[str, str], zone: ZoneInfo) -> datetime | None:
    """The instant that was entered, which has no offset and is in the zone of the viewer; None if
    it is empty.
    """
    if not (given := fields.get(name, "").strip()):
        return None
    try:
        found = datetime.fromisoformat(given[:LONGEST_INSTANT])
        return (found.replace(tzinfo=zone) if found.tzinfo is None else found).astimezone(UTC)
    except (ValueError, OverflowError):
        raise Refused(422, f"{name}: allowed is an instant such as 2026-10-24T18:00") from None


def check_number(count: int, fields: Mapping[str, str]) -> None:
    """Raises Refused if there are so many runs that their number must be typed, and it was not."""
    if count > TYPED_FROM and fields.get("number", "").replace(",", "").strip() != str(count):
        raise Refused(422, f"number: enter the number of runs, {count}, because there are many")


def local_path(given: str | None, default: str = "/") -> str:
    """The path on this site that a form or a link names, or the default; never an address on
    another site.
    """
    if (
        not given
        or not given.startswith("/")
        or given.startswith(("//", "/\\"))
        or len(given) > 2_000
    ):
        return default
    parts = urlsplit(given)
    is_plain = given.isprintable() and "\\" not in given
    return given if is_plain and not parts.scheme and not parts.netloc else default
