"""The states of a run. This module imports little, because the completion of a shell needs it."""

from __future__ import annotations

from service.batch.ledger.states import RunState

STATES: tuple[str, ...] = tuple(RunState)
