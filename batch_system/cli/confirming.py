"""Asks a person at a terminal before doing something that can't be undone."""

from __future__ import annotations

import sys

from batch_system.errors import InvalidParameters


def confirm(question: str, outcome: str) -> None:
    """Let a person answer yes. Raises InvalidParameters for another answer, or if there is no
    terminal.

    `outcome`: what the error says first, such as "nothing was deleted".
    """
    from batch_system import console

    if not sys.stdin.isatty():
        raise InvalidParameters(
            f"{outcome}: stdin is no terminal, so --yes is needed to confirm it"
        )
    console.warn(f"{question} [y/N] ", end="")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise InvalidParameters(f"{outcome}: the answer was not yes")
