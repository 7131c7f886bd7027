"""The states that a run can be in. (A module of its own, which imports little: a shell's completion asks for it.)"""

from __future__ import annotations

from service.batch.ledger.states import RunState

STATES: tuple[str, ...] = tuple(RunState)
