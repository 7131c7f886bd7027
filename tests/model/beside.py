"""What two nodes do at the same time: on PostgreSQL, for SQLite has one writer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

from hypothesis import strategies as st
from hypothesis.stateful import precondition
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.firing import firing, waiting
from batch_system.batch.firing.firing import Fired
from batch_system.batch.ledger import transitions
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.nodes import orphans
from batch_system.batch.queue import claiming
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.tasks.registry import Task
from tests.model.machine import ENDS, LIMITED, MANY, NUMBER, OTHER, WHICH, Machine, Process, does
from tests.model.plain import BY_HAND, FINAL


class Beside(Machine):
    """The second transaction begins and ends while the first is not committed yet."""

    @does(which=WHICH)
    def fire_beside(self, which: str) -> None:
        """A node fires while the other is about to commit the same: it leaves that to it."""
        process, other = self.processes[which], self.processes[OTHER[which]]
        shared, more = (
            process.tasks.keys() & other.tasks.keys(),
            other.tasks.keys() - process.tasks.keys(),
        )
        self.model.fire(process.tasks.keys(), process.id, MANY)
        first = partial(_fire, process, list(process.tasks))
        fired, nothing = self.world.write_beside(first, partial(_fire, other, list(shared)))
        there = {name for name in shared if self.model.tasks[name].removed_at is None}
        assert (nothing.claimed, nothing.queued, nothing.again_at.keys()) == ([], 0, there)
        self._take(process, fired.claimed)
        again = {name for name, at in fired.again_at.items() if at <= fired.now}
        self._fire_on(process, again, Capacity(MANY, MANY))
        self._fire(OTHER[which], more, MANY)
        self.model.happened["fired beside another"] += 1

    @does(which=WHICH, most=st.sampled_from([1, MANY]))
    def claim_beside(self, which: str, most: int) -> None:
        """A node claims while the other is about to commit its claim: each run goes to one of
        them.
        """
        process, other = self.processes[which], self.processes[OTHER[which]]
        mine = self.model.claim(without_limit(process), process.id, most)
        theirs = self.model.claim(without_limit(other), other.id, MANY)
        first, second = partial(_take, process, most), partial(_take, other, MANY)
        for holder, claimed in zip(
            (process, other), self.world.write_beside(first, second), strict=True
        ):
            self._take(holder, claimed)
        for holder in (process, other) if most == MANY else (other,):
            while found := self._claim_some(holder, MANY, without_limit(holder)):
                self._take(holder, found)
        held = {
            row["id"]: row["node"]
            for row in self.world.look().runs.values()
            if row["state"] == "running"
        }
        assert {held.get(run.id) for run in mine} <= {process.id}
        assert {held.get(run.id) for run in theirs} <= {other.id}
        self.model.happened["claimed beside another"] += len(mine) and len(theirs)

    @precondition(lambda self: any(run.state == "waiting" for run in self.model.runs))
    @does(which=WHICH)
    def open_beside(self, which: str) -> None:
        """A node looks at what waits while the other one is about to commit what it opens: it
        leaves that to it.
        """
        process, other = self.processes[which], self.processes[OTHER[which]]
        expected = self.model.look(process.tasks.keys())
        opened, nothing = self.world.write_beside(partial(_open, process), partial(_open, other))
        assert (opened, nothing) == (expected, 0)
        self.model.happened["opened beside another"] += opened

    @precondition(
        lambda self: any(run.state in FINAL and run.awaited_by for run in self.model.runs)
    )
    @does(number=NUMBER, which=WHICH)
    def open_beside_a_retry(self, number: int, which: str) -> None:
        """A node looks at what waits while a person is about to have a member of a group go on:
        that group waits.
        """
        among = [run for run in self.model.runs if run.state in FINAL and run.awaited_by]
        run = among[number % len(among)]
        self.by_a_person = True
        expected = self.model.reopen(run, BY_HAND, FINAL, anew=True)
        reopen = partial(
            transitions.reopen, ids=[run.id], rank=BY_HAND, by="ann", now=clock.now(), anew=True
        )
        process = self.processes[which]
        reopened, _ = self.world.write_beside(reopen, partial(_open, process))
        assert reopened == ({run.id} if expected else set())
        if run.part is not None:
            self.model.resumed.add(run.id)  # its run may fail fast because of another part
        # Runs that the retry has not touched go on at the first look, and others because of them.
        while self.model.look(process.tasks.keys()):
            pass
        while self.world.write(_open_in, process):
            pass

    @precondition(lambda self: bool(self.held))
    @does(number=NUMBER, how=st.sampled_from(ENDS))
    def finish_beside_a_rescue(self, number: int, how: str) -> None:
        """An attempt's end is about to be committed when its node is taken for dead: it counts."""
        process, claimed = self.held[number % len(self.held)]
        rescuer = next(each for each in self.processes.values() if each is not process)
        self._look(rescuer)
        end = self._end(process, claimed, how)
        group = self._group(process, [end])
        bounced, gone = self.world.write_beside(group.write, partial(_rescue, rescuer.counters))
        assert (not bounced) is self._ends(*end)
        assert sorted(gone) == sorted(self.model.rescue(rescuer.counters))


class PartsBeside(Beside):
    """The same with parts."""

    @precondition(lambda self: all(map(self._parts_on, self.processes.values())))
    @does(which=WHICH, hows=st.tuples(*[st.sampled_from(["succeeded", *ENDS])] * 2))
    def end_parts_beside_each_other(self, which: str, hows: tuple[str, str]) -> None:
        """Two nodes end parts at the same moment, and none sees what the other writes: the run goes
        on once.
        """
        both = [self.processes[which], self.processes[OTHER[which]]]
        ends = [
            self._end(each, self._parts_on(each)[0], how)
            for each, how in zip(both, hows, strict=True)
        ]
        first, second = (self._group(each, [end]) for each, end in zip(both, ends, strict=True))
        assert self.world.write_beside(first.write, second.write) == ([], [])
        assert all(self._ends(*end) for end in ends)
        self.model.happened["parts ended beside each other"] += 1
        self._open(which)
        self._open(OTHER[which])

    def _parts_on(self, process: Process) -> list[Claimed]:
        return [
            one
            for one in process.held.values()
            if one.part is not None and self._is_held_by(process, one)
        ]


async def _fire(process: Process, names: Collection[str], connection: AsyncConnection) -> Fired:
    return await firing.fire(connection, names, process.tasks, process.id, Capacity(MANY, MANY))


async def _open(process: Process, connection: AsyncConnection) -> int:
    return (await waiting.open_and_close(connection, process.tasks, clock.now())).number


async def _open_in(connection: AsyncConnection, process: Process) -> int:
    return await _open(process, connection)


async def _take(process: Process, most: int, connection: AsyncConnection) -> list[Claimed]:
    tasks = without_limit(process)
    return (await claiming.take(connection, tasks, process.id, Capacity(most, most)))[0]


def without_limit(process: Process) -> dict[str, Task]:
    """Its tasks, except the one with a limit: which of its runs are first depends on turns."""
    return {name: task for name, task in process.tasks.items() if name != LIMITED}


async def _rescue(dead: Mapping[str, int], connection: AsyncConnection) -> list[str]:
    return await orphans.rescue(connection, dead, clock.now())
