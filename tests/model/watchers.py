"""What the watch of a node notices, and what a person acknowledges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import datetime

from hypothesis.stateful import precondition
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.ledger.incidents import acknowledging
from batch_system.batch.ledger.incidents.tables import incidents, outbox
from tests.incidents.watching import Watching
from tests.model.machine import MANY, NUMBER, WHICH, Machine, does
from tests.model.plain import Run
from tests.model.world import Row, Snapshot


class Watchers(Machine):
    """One of the two nodes has the duty of the watch. The other one takes it when that one is
    gone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watchers: dict[str, Watching] = {}
        self.seen: dict[str, tuple[int, datetime | None]] = {}
        """The fence and the end of each failed run that was noticed."""

    @does(which=WHICH)
    def notice(self, which: str) -> None:
        """A node polls the ledger, notices what has failed if it has the duty, and makes its
        checks.
        """
        self._notice(which)

    @precondition(lambda self: any(run.state == "failed" for run in self.model.runs))
    @does(which=WHICH)
    def recover(self, which: str) -> None:
        """After a failure a node executes what waits, all of it with success, and notices what that
        makes good.
        """
        self._claim(which, MANY)
        self._finish_all(which, ["succeeded"])
        self._notice(which)

    def _notice(self, which: str) -> None:
        new = {
            run.id
            for run in self.model.runs
            if run.state == "failed" and run.part is None and self._is_new(run)
        }
        before = self.world.look()
        unnoticed = {
            id
            for id, row in before.runs.items()
            if row["state"] == "failed" and row["noticed_at"] is None
        }
        assert unnoticed == new
        counted = self._counted()
        watcher = self._watcher(which)
        self.world.run(watcher.turn(2))
        after = self.world.look()
        if not watcher.watch.holds:
            assert self.world.read(_incidents) == [] or self._counted() == counted
            return
        problems = [*_unnoticed(after), *_wrong_incidents(after, self.world.read(_incidents))]
        assert not problems, "\n".join(["", *problems])
        harms = [
            id
            for id, row in before.runs.items()
            if _waits_after_a_loss(row) and row["noticed_at"] is None
        ]
        to_tell = [
            before.runs[id]["task"]
            for id in (*new, *harms)
            if before.runs[id]["acknowledged"] is None
        ]
        assert self._counted() - counted == Counter(to_tell)
        assert _told_twice(self.world.read(_notes)) == []
        self.seen |= {
            run.id: (run.fence, run.finished_at) for run in self.model.runs if run.id in new
        }
        self.model.happened["noticed"] += len(new)
        good = [
            id
            for id, row in after.runs.items()
            if row["made_good_at"] and not before.runs[id]["made_good_at"]
        ]
        self.model.happened["made good"] += len(good)
        problems = [problem for id in good for problem in _wrongly_good(after, after.runs[id])]
        assert not problems, "\n".join(["", *problems])

    @precondition(lambda self: any(run.state == "failed" for run in self.model.runs))
    @does(number=NUMBER)
    def acknowledge(self, number: int) -> None:
        """A person acknowledges a failed run."""
        failed = [run for run in self.model.runs if run.state == "failed"]
        run = failed[number % len(failed)]
        row = self.before.runs[run.id]
        is_open = (
            row["fingerprint"] is not None
            and row["acknowledged"] is None
            and row["made_good_at"] is None
        )
        done = self.world.write(
            acknowledging.acknowledge_runs, [run.id], "ann", "known", clock.now()
        )
        assert (done.runs, done.is_new) == (int(is_open), is_open)
        self.model.happened["acknowledged"] += is_open

    def _is_new(self, run: Run) -> bool:
        return self.seen.get(run.id) != (run.fence, run.finished_at)

    def _watcher(self, which: str) -> Watching:
        process = self.processes[which]
        if process.id not in self.watchers:
            self.watchers[process.id] = Watching(
                self.world.ledger, self.world.application, node=process.id
            )
        return self.watchers[process.id]

    def _counted(self) -> Counter[str]:
        """How many failures of each task the incidents have counted."""
        counted: Counter[str] = Counter()
        for row in self.world.read(_incidents):
            counted[row["task"]] += row["count"] if row["kind"] == "failed" else 0
        return counted


def _waits_after_a_loss(row: Row) -> bool:
    return bool((row["state"], row["fingerprint"]) == ("retrying", "lost"))


def _is_open(row: Row, *states: str) -> bool:
    """`states`: in which the run has to be; none: in any."""
    if states and row["state"] not in states:
        return False
    return bool(row["fingerprint"] and row["acknowledged"] is None and row["made_good_at"] is None)


def _unnoticed(now: Snapshot) -> Iterator[str]:
    for row in now.runs.values():
        if row["state"] == "failed" and row["origin"] == "part" and row["fingerprint"] is not None:
            yield f"part {row['part']} of {row['task']}: it was noticed by itself"
        elif (
            row["state"] == "failed"
            and row["origin"] != "part"
            and None in (row["noticed_at"], row["fingerprint"])
        ):
            yield f"{row['task']} {row['slot']}: it has failed, and was not noticed"


def _wrong_incidents(now: Snapshot, known: list[Row]) -> Iterator[str]:
    """There is an open incident of each task and error with an open failed run, and no other one of
    failed runs.

    A run that a person has retried since it failed keeps its incident. If it was retried before
    anybody noticed that it had failed, it has none.
    """
    of_runs = [row for row in known if row["kind"] == "failed" and row["closed_at"] is None]
    opened = Counter((row["task"], row["fingerprint"]) for row in of_runs)
    bad = {(row["task"], row["fingerprint"]) for row in now.runs.values() if _is_open(row)}
    failed = {
        (row["task"], row["fingerprint"]) for row in now.runs.values() if _is_open(row, "failed")
    }
    yield from (
        f"{task} {error}: {number} incidents are open"
        for (task, error), number in opened.items()
        if number > 1
    )
    yield from (f"{task} {error}: no incident is open" for task, error in failed - opened.keys())
    yield from (
        f"{task} {error}: an incident is open without a failed run"
        for task, error in opened.keys() - bad
    )


def _wrongly_good(now: Snapshot, row: Row) -> Iterator[str]:
    """A failed run is made good by a run of its task that has succeeded later; by itself after a
    retry.
    """
    success = now.runs.get(row["made_good_by"])
    if (
        success is None
        or success["state"] != "succeeded"
        or success["task"] != row["task"]
        or success["part"]
    ):
        yield f"{row['task']} {row['slot']}: it was made good by {success}"
    elif row["state"] == "failed" and success["finished_at"] < row["finished_at"]:
        yield f"{row['task']} {row['slot']}: it was made good by an earlier run, {success['slot']}"


def _told_twice(notes: list[Row]) -> list[tuple[str, str]]:
    told = Counter((row["incident"], row["kind"]) for row in notes)
    return [key for key, number in told.items() if number > 1]


async def _incidents(connection: AsyncConnection) -> list[Row]:
    return [dict(row) for row in (await connection.execute(select(incidents))).mappings()]


async def _notes(connection: AsyncConnection) -> list[Row]:
    return [dict(row) for row in (await connection.execute(select(outbox))).mappings()]
