"""What a person means by the words of a search. Pure: it believes nothing and looks nothing up."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batch_system.batch.ledger.states import RunState

LONGEST = 200
MOST_WORDS = 8
SHORTEST_START = 4
"""The beginning of a state or an action stands for it if it has this many letters."""
FILLERS = frozenset(("a", "all", "of", "run", "runs", "task", "tasks", "the", "until", "with"))
PARAMETER = re.compile(r"\w+=\S.*")
DIGITS = re.compile(r"[0-9a-f]{6,32}")
STATES = {
    "active": "active",
    **{str(state): str(state) for state in RunState},
    "failing": "failed",
    "canceled": "cancelled",
}
ACTIONS = {
    "retry": "retry",
    "acknowledge": "acknowledge",
    "start": "start",
    "pause": "pause",
    "resume": "resume",
    "mute": "mute",
    "backfill": "backfill",
    "cancel": "cancel",
    "ack": "acknowledge",
    "rerun": "retry",
}


@dataclass(frozen=True)
class Meaning:
    """`text`: as it was entered, without spaces around it. `words`: all of it, in small letters.

    `states`, `actions`: those that are named. `rest`: the other words, which are a part of the name
    of a task, a tag, or of a reason. `digits`: of the id of a run; empty if it can't be one.
    """

    text: str
    words: Sequence[str] = ()
    states: Sequence[str] = ()
    actions: Sequence[str] = ()
    rest: Sequence[str] = ()
    digits: str = ""

    @property
    def is_parameter(self) -> bool:
        """Whether it is NAME=VALUE."""
        return PARAMETER.fullmatch(self.text) is not None


def meaning_of(given: str) -> Meaning:
    """What these words mean. Of a longer text only the beginning counts."""
    text = given.strip()[:LONGEST]
    words = tuple(text.lower().split()[:MOST_WORDS])
    states: list[str] = []
    actions: list[str] = []
    rest: list[str] = []
    for word in words:
        if (action := _meant(word, ACTIONS)) is not None:
            actions.append(action)
        elif (state := _meant(word, STATES)) is not None:
            states.append(state)
        elif word not in FILLERS:
            rest.append(word)
    digits = text.lower().replace("-", "")
    return Meaning(
        text,
        words,
        tuple(dict.fromkeys(states)),
        tuple(dict.fromkeys(actions)),
        tuple(rest),
        digits if DIGITS.fullmatch(digits) else "",
    )


def _meant(word: str, known: Mapping[str, str]) -> str | None:
    """The state or the action that a word, or the beginning of one, stands for."""
    if word in known:
        return known[word]
    begun = {meant for name, meant in known.items() if name.startswith(word)}
    return begun.pop() if len(word) >= SHORTEST_START and len(begun) == 1 else None
