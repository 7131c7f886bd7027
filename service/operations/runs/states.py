"""The states of a run. This module imports little, because the completion of a shell needs it."""

from __future__ import annotations

from service.batch.ledger.states import FINAL, RunState

STATES: tuple[str, ...] = tuple(RunState)

FINAL_STATES = frozenset(str(state) for state in FINAL)
"""The states in which a run has ended."""
