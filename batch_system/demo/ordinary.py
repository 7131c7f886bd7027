"""Makes the runs that nothing is told of: those of all slots, with the durations of their tasks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from batch_system.batch.cron.cron import schedule
from batch_system.batch.ledger.run_logs import Block, LogLine
from batch_system.batch.ledger.states import Origin, Rank, RunState
from batch_system.demo.cast import Part
from batch_system.demo.failing import Failure, failure_of, stamp
from batch_system.demo.times import DOWNS, NOW, SERVICES, at

LOGGED_FROM = at("10-23 16:00")
"""Earlier runs have no log."""
LONG = ("crm_sync", "catalog_sync")
"""Runs of these tasks are interrupted when their service ends; short ones end in time."""
SEED = 7


@dataclass(frozen=True)
class Piece:
    """A part of a run between its start and its end, or the end of its service, by which it was
    interrupted.
    """

    node: str
    begin: datetime
    end: datetime
    outcome: str
    number: int = 1
    failure: Failure | None = None


@dataclass(frozen=True)
class Made:
    """A run that has ended: its row, its attempts and its log. `ended`: when it comes into the
    ledger.
    """

    run: dict[str, Any]
    attempts: list[dict[str, Any]]
    log: list[Block]

    @property
    def ended(self) -> datetime:
        ended: datetime = self.run["finished_at"]
        return ended


class Maker:
    """Makes the runs of one task. `nodes`: the id of each service of SERVICES. `new_id`: an id of
    an instant.
    """

    def __init__(
        self, part: Part, nodes: list[str], exclusive: str | None, new_id: Callable[[datetime], str]
    ) -> None:
        self._part, self._nodes, self._exclusive, self._new_id = part, nodes, exclusive, new_id
        self.random = random.Random(f"{SEED} {part.name}")
        self._failure = failure_of(part.name, part.flaky[0]) if part.flaky else None
        self._wait = 1200.0 if part.flaky and "RetryAfter" in part.flaky[0] else 30.0

    def of_slots(
        self, cron: str, after: datetime, until: datetime, is_told: Callable[[datetime], bool]
    ) -> Iterator[Made]:
        """The runs of the slots of this schedule that services have fired on time. `is_told`: slots
        without one.
        """
        slots = list(schedule(cron, self._part.zone).between(after, until))
        for slot, following in zip(slots, [*slots[1:], None], strict=True):
            if any(down.has(slot) for down in DOWNS) or is_told(slot):
                continue
            longest = (
                (following - slot).total_seconds() * 0.85 if following is not None else math.inf
            )
            yield self.run(
                slot + timedelta(seconds=self.random.uniform(0.02, 0.3)), slot, longest=longest
            )

    def run(
        self,
        created: datetime,
        slot: datetime | None = None,
        *,
        longest: float = math.inf,
        **values: Any,
    ) -> Made:
        """One run that has succeeded. `values`: further columns of its row."""
        begin = created + timedelta(seconds=self.random.uniform(0.01, 0.5))
        seconds = self.random.lognormvariate(math.log(self._part.usual), self._part.spread)
        pieces = list(self._pieces(begin, timedelta(seconds=min(seconds, longest))))
        run = self._row(created, slot, pieces) | values
        return Made(
            run,
            [_attempt(run["id"], fence, piece) for fence, piece in enumerate(pieces, 1)],
            self._log(run, pieces),
        )

    def _pieces(self, begin: datetime, length: timedelta) -> Iterator[Piece]:
        number = 1
        if (
            self._failure is not None
            and self._part.flaky is not None
            and self.random.random() < self._part.flaky[1]
        ):
            end = begin + timedelta(seconds=self.random.uniform(4, 30))
            yield Piece(self._host(begin, end)[0], begin, end, "failed", 1, self._failure)
            begin, number = end + timedelta(seconds=self._wait + 0.6), 2
        while True:
            node, ends, is_lost = self._host(begin, begin + length)
            end = begin + length
            if ends is None or end < ends:
                yield Piece(
                    node,
                    begin,
                    min(end, max(begin, NOW - timedelta(seconds=1.5))),
                    "succeeded",
                    number,
                )
                return
            if self._part.name not in LONG:
                yield Piece(
                    node, begin, max(begin, ends - timedelta(seconds=0.5)), "succeeded", number
                )
                return
            yield Piece(node, begin, ends, "lost" if is_lost else "interrupted", number)
            length = end - ends
            begin = min(s.start for s in SERVICES if s.start > ends) + timedelta(seconds=1.3)

    def _host(self, begin: datetime, end: datetime) -> tuple[str, datetime | None, bool]:
        """The node that has the run, and when its service ends before the run would: one without
        such an end if any.
        """
        now = [n for n, service in enumerate(SERVICES) if service.is_up(begin, begin)]
        lasting = [n for n in now if SERVICES[n].is_up(begin, end)]
        chosen = self.random.choice(lasting or now)
        service = SERVICES[chosen]
        return self._nodes[chosen], None if lasting else service.end, service.is_lost

    def _row(self, created: datetime, slot: datetime | None, pieces: list[Piece]) -> dict[str, Any]:
        last, items = pieces[-1], self._part.items
        return {
            "id": self._new_id(created),
            "task": self._part.name,
            "slot": slot,
            "origin": Origin.SCHEDULE if slot is not None else Origin.MANUAL,
            "state": RunState.SUCCEEDED,
            "params": None,
            "result": {"rows": self.random.randint(items * 8 // 10, items)} if items else None,
            "rank": Rank.ON_TIME if slot is not None else Rank.MANUAL,
            "catch_up": False,
            "exclusive": self._exclusive,
            "due_at": created if last.number == 1 else last.begin,
            "attempt": last.number,
            "node": last.node,
            "fence": len(pieces),
            "requested_by": None,
            "parent": None,
            "created_at": created,
            "started_at": pieces[0].begin,
            "attempt_started_at": last.begin,
            "finished_at": last.end,
        }

    def _log(self, run: dict[str, Any], pieces: list[Piece]) -> list[Block]:
        if run["created_at"] < LOGGED_FROM:
            return []
        blocks = []
        for fence, piece in enumerate(pieces, 1):
            lines = [
                LogLine(
                    stamp(piece.begin + (piece.end - piece.begin) * 0.05),
                    "info",
                    self.logger,
                    "begins",
                )
            ]
            if piece.failure is not None:
                lines.append(
                    piece.failure.line(
                        piece.end, f"; attempt {piece.number + 1} follows in {self._wait:.1f} s"
                    )
                )
            elif piece.outcome == "succeeded":
                rows = (run["result"] or {"rows": 1})["rows"]
                lines.append(
                    LogLine(stamp(piece.end), "info", self.logger, f"{self._part.says} rows={rows}")
                )
            blocks.append(Block(run["id"], fence, piece.number, 0, lines))
        return blocks

    @property
    def logger(self) -> str:
        return f"tasks.{self._part.name}"


def _attempt(run: str, fence: int, piece: Piece) -> dict[str, Any]:
    return {
        "run": run,
        "fence": fence,
        "number": piece.number,
        "node": piece.node,
        "started_at": piece.begin,
        "ended_at": piece.end,
        "outcome": piece.outcome,
        "error": piece.failure.facts if piece.failure is not None else None,
    }
