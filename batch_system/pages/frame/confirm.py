"""A page that asks before something is changed: what will happen, choices, a note, and a way
back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import shell_of
from batch_system.pages.frame.viewer import Viewer


class Field(NamedTuple):
    """A line or a text to enter. `kind`: the type of an HTML input, or textarea."""

    name: str
    label: str
    hint: str = ""
    kind: str = "textarea"
    value: str = ""
    is_needed: bool = False


class Option(NamedTuple):
    """One of several choices; the first one is chosen."""

    value: str
    label: str
    hint: str = ""


@dataclass(frozen=True)
class Confirm:
    """What a person is asked. `do`, `leave`: the words on the buttons; without `do` there is
    nothing to do.

    `back`: where the second button leads if the page from which the person came is not known.

    `facts`: names and values. `choice`: the name of the field with the `options`.
    """

    title: str
    words: Sequence[str]
    do: str
    leave: str
    back: str
    facts: Sequence[tuple[str, str]] = ()
    choice: str = ""
    options: Sequence[Option] = ()
    fields: Sequence[Field] = ()

    def with_options(self, choice: str, options: Sequence[Option]) -> Confirm:
        """The same with choices."""
        return replace(self, choice=choice, options=options)

    def with_facts(self, facts: Sequence[tuple[str, str]]) -> Confirm:
        """The same with facts."""
        return replace(self, facts=facts)

    def with_fields(self, *fields: Field) -> Confirm:
        """The same with fields."""
        return replace(self, fields=fields)


async def confirm(viewer: Viewer, current: str, asked: Confirm) -> str:
    """The page. Its form is sent to the address of the page itself."""
    values = [option.value for option in asked.options]
    entered = viewer.entered.get(asked.choice)
    chosen = entered if entered in values else next(iter(values), "")
    return await render(
        "confirm.html", **await shell_of(viewer, current, asked.title), asked=asked, chosen=chosen
    )
