"""Which success makes which failed run good."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import pytest

from batch_system.batch.incidents.made_good import matches

BEGIN = datetime(2026, 3, 10, tzinfo=UTC)


@dataclass
class Row:
    """A run as the ledger has it. `looks` counts how often the ends of all rows are looked at."""

    looks: ClassVar[int] = 0
    id: str
    state: str
    slot: datetime | None
    params: dict[str, Any] | None
    ended: datetime
    fingerprint: str | None = None

    @property
    def finished_at(self) -> datetime:
        Row.looks += 1
        return self.ended


def row(number: int, state: str, rng: random.Random, spread: int) -> Row:
    slot = BEGIN + timedelta(minutes=rng.randrange(spread)) if rng.random() < 0.5 else None
    params = rng.choice([None, {}, {"day": 1}, {"day": 2, "to": ["a"]}])
    ended = BEGIN + timedelta(seconds=rng.randrange(60 * spread))
    return Row(
        f"{state}-{number}", state, slot, params, ended, "1:abc" if state == "failed" else None
    )


def plain(failures: list[Row], successes: list[Row], each_slot_counts: bool) -> dict[str, datetime]:
    """The same by comparing each with each: when the first success ended that makes the failure
    good.
    """
    found: dict[str, datetime] = {}
    for failure in failures:
        good = [
            success.ended
            for success in successes
            if success.ended >= failure.ended
            and (
                (failure.slot is not None and success.slot == failure.slot)
                or (not each_slot_counts and (success.params or {}) == (failure.params or {}))
            )
        ]
        if good:
            found[failure.id] = min(good)
    return found


@pytest.mark.parametrize("each_slot_counts", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_a_failure_is_made_good_by_the_first_success_of_its_work_after_it(
    seed: int, each_slot_counts: bool
) -> None:
    rng = random.Random(seed)
    failures = [row(number, "failed", rng, 12) for number in range(30)]
    successes = [row(number, "succeeded", rng, 12) for number in range(30)]
    ended = {success.id: success.ended for success in successes}
    found = matches(failures, successes, each_slot_counts)  # type: ignore[arg-type]
    assert {failure: ended[success] for failure, success in found.items()} == plain(
        failures, successes, each_slot_counts
    )


def test_a_run_does_not_make_itself_good() -> None:
    """Its retry may have succeeded between two reads."""
    failed = Row("one", "failed", BEGIN, None, BEGIN, "1:abc")
    itself = Row("one", "succeeded", BEGIN, None, BEGIN + timedelta(seconds=1))
    other = Row("two", "succeeded", BEGIN, None, BEGIN + timedelta(seconds=2))
    assert matches([failed], [itself], False) == {}  # type: ignore[list-item]
    assert matches([failed], [itself, other], False) == {"one": "two"}  # type: ignore[list-item]


def test_a_thousand_failures_are_not_compared_with_a_thousand_successes_one_by_one() -> None:
    rng = random.Random(1)
    failures = [row(number, "failed", rng, 10_000) for number in range(1_000)]
    successes = [row(number, "succeeded", rng, 10_000) for number in range(1_000)]
    Row.looks = 0
    matches(failures, successes, False)  # type: ignore[arg-type]
    assert Row.looks < 40_000
