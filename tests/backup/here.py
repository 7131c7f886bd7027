"""Backups without a process of their own, whose start takes most of a test's time."""

from __future__ import annotations

import pytest

from batch_system.backup.making import create, worker

in_a_process = create.run_worker


def make_backups_here(patch: pytest.MonkeyPatch) -> None:
    """Have the worker carry the backups out in the calling thread."""
    patch.setattr(create, "run_worker", worker.carry_out)
