"""What programs and people outside rely on, as it was last reviewed: the document of the HTTP API,
and the help of all commands.

    python -m tests.stored

writes both anew. Each difference is meant, and stands in the CHANGELOG.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

FOLDER = Path(__file__).parent / "stored"


def document() -> str:
    """The OpenAPI document."""
    from batch_system.app import create_app

    made = create_app().openapi()  # type: ignore[attr-defined]
    return json.dumps(_unwrapped(made), indent=1, sort_keys=True) + "\n"


def _unwrapped(value: Any) -> Any:
    """The same with each description in one line, however its docstring is wrapped."""
    if isinstance(value, dict):
        return {
            key: " ".join(each.split())
            if key == "description" and isinstance(each, str)
            else _unwrapped(each)
            for key, each in value.items()
        }
    return [_unwrapped(each) for each in value] if isinstance(value, list) else value


def helps() -> str:
    """The help of all commands, with their arguments and options, without a terminal's form."""
    from batch_system.cli import cli

    return "\n".join(_help_of(typer.main.get_command(cli), "batch")) + "\n"


def _help_of(command: object, name: str) -> Iterator[str]:
    assert isinstance(command, TyperCommand | TyperGroup)
    yield f"## {name}"
    yield " ".join((command.help or "").split())
    for each in command.params:
        if isinstance(each, TyperArgument):
            yield f"{each.name}: {each.help or ''}"
        elif isinstance(each, TyperOption):
            yield f"{', '.join([*each.opts, *each.secondary_opts])}: {each.help or ''}"
    yield ""
    if isinstance(command, TyperGroup):
        context = command.make_context(name, [], resilient_parsing=True)
        for word in sorted(command.list_commands(context)):
            yield from _help_of(command.get_command(context, word), f"{name} {word}")


MADE = {"openapi.json": document, "help.txt": helps}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, make in MADE.items():
        (FOLDER / file).write_text(make())
