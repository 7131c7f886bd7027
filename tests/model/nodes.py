"""What nodes do to the ledger, one transaction after the other."""

from __future__ import annotations

from datetime import datetime, timedelta

from hypothesis import strategies as st
from hypothesis.stateful import precondition
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.firing import firing, pauses
from batch_system.batch.firing.firing import Fired
from batch_system.batch.ledger import attempts, nodes, transitions
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.nodes import orphans
from batch_system.batch.queue import claiming
from batch_system.batch.queue.claiming import Capacity
from tests.model.machine import ENDS, MANY, NUMBER, OTHER, WHICH, Machine, Process, does
from tests.model.plain import ACTIVE, slots

EARLY = timedelta(seconds=0.3)
"""So long before they are due slots are fired early."""

ROUNDS_TO_THE_END = 10
"""After so many minutes in which all goes well, what was active is over."""


class Nodes(Machine):
    """What a node believes may be out of date: what it holds, what it saw when it looked for work
    or at the others.
    """

    def teardown(self) -> None:
        try:
            if self.processes:
                self._end_all()
        finally:
            super().teardown()

    def _end_all(self) -> None:
        """From here on nothing goes wrong, and nobody interferes: whatever has happened, all that
        is active ends.
        """
        for name in [task.name for task in self.model.tasks.values() if task.paused_by is not None]:
            self.model.resume(self.model.tasks[name])
            self.world.write(pauses.resume, name)
        left = [run for run in self.model.runs if run.state in ACTIVE]
        for _ in range(ROUNDS_TO_THE_END):
            if not (left := [run for run in left if run.state in ACTIVE]):
                break
            self.model.now = clock.advance(timedelta(seconds=61))
            for which in OTHER:
                self._outlive(which, beats=True)
            for which in OTHER:
                self._fire(which, self.processes[which].tasks, MANY)
                self._open(which)
            while any(self._work_off(which) for which in OTHER):
                self.compare()
        assert [str(run) for run in left if run.state in ACTIVE] == []

    def _work_off(self, which: str) -> bool:
        """A node claims what it can, all that it holds succeeds, and it opens what waited for
        that.
        """
        self._claim(which, MANY)
        has_worked = bool(self.processes[which].held)
        self._finish_all(which, ["succeeded"])
        self._open(which)
        return has_worked

    # Firing and claiming

    @does(which=WHICH, how=st.sampled_from(["succeeded", *ENDS, None]))
    def go_on(self, which: str, how: str | None) -> None:
        """A node does what it always does: its attempts end, it fires, and claims what may
        start.
        """
        if how is not None:
            self._finish_all(which, [how])
        self._fire(which, self.processes[which].tasks, MANY)
        self._open(which)
        self._claim(which, MANY)

    go_on_often = go_on  # else most of what hypothesis chooses happens to an empty ledger

    @does(which=WHICH, room=st.sampled_from([0, 1, MANY]), number=NUMBER)
    def fire(self, which: str, room: int, number: int) -> None:
        """A node handles the slots that are due, and starts their runs where it has room.

        With little room those of one task: of several it would go to the one that is handled in
        fewer transactions.
        """
        names = list(self.processes[which].tasks)
        self._fire(which, [names[number % len(names)]] if room == 1 and names else names, room)

    @does(which=WHICH)
    def fire_early(self, which: str) -> None:
        """A node fires the next slots before they are due, and commits when they are. What is left
        it fires then.
        """
        process = self.processes[which]
        names = list(process.tasks)
        slot = min(map(self._next_slot, names))
        clock.advance(slot - EARLY - clock.now())
        fired = self.world.write(_fire_early, process, names, slot)
        self.model.now = clock.now()
        self.model.fire(names, process.id, MANY)
        self.model.happened["fired early"] += len(fired.claimed)
        self._take(process, fired.claimed)
        left = {name for name, at in fired.again_at.items() if at <= fired.now}
        self._fire_on(process, left, Capacity(MANY, MANY))

    def _next_slot(self, name: str) -> datetime:
        """The first slot of a task that is more than EARLY to come."""
        now = clock.now() + EARLY
        return next(
            iter(slots(self.model.tasks[name].spans[-1].period, now, now + timedelta(days=1)))
        )

    @does(which=WHICH, most=st.sampled_from([1, 2, MANY]))
    def claim(self, which: str, most: int) -> None:
        """A node claims so many runs."""
        self._claim(which, most)

    @does(which=WHICH)
    def look_for_work(self, which: str) -> None:
        """A node looks for what may start, and does not take it yet."""
        process = self.processes[which]
        process.heads = self.world.read(claiming.startable, process.tasks, Capacity(MANY, MANY))[1]

    @precondition(lambda self: any(process.heads for process in self.processes.values()))
    @does(which=WHICH)
    def claim_by_an_old_look(self, which: str) -> None:
        """A node takes what it saw when it last looked; somebody else may have been quicker."""
        process = self.processes[which]
        wanted = {head.id: head.lane for head in process.heads}
        process.heads = []
        now = {row["id"]: row["lane"] for row in self.before.runs.values()}
        expected = self.model.claim_these(wanted, now, process.id)
        others = {run: lane for run, lane in wanted.items() if lane > 1}
        try:
            claimed = self.world.write(
                transitions.claim, list(wanted), process.id, clock.now(), others
            )
        except IntegrityError:
            assert expected is None, "the database refuses what the model allows"
            return
        assert expected is not None, "the database allows what the model refuses"
        self._take(process, claimed)
        assert {one.id for one in claimed} == {run.id for run in expected}

    # Opening

    @precondition(lambda self: any(run.state == "waiting" for run in self.model.runs))
    @does(which=WHICH)
    def look(self, which: str) -> None:
        """A node opens and closes what waits, if it is ready."""
        self._open(which)

    @does(which=WHICH, seconds=st.sampled_from([20, 59]))
    def pile_up(self, which: str, seconds: int) -> None:
        """A node fires several times while nothing ends, and then all ends with success: many slots
        open at once.
        """
        for _ in range(3):
            self.model.now = clock.advance(timedelta(seconds=seconds))
            self._fire(which, self.processes[which].tasks, MANY)
            self.compare()
        for _ in range(2):
            self._claim(which, MANY)
            self._finish_all(which, ["succeeded"])
        self._open(which)

    # Ends

    @precondition(lambda self: bool(self.held))
    @does(number=NUMBER, how=st.sampled_from(ENDS), times=st.sampled_from([1, 1, 2]))
    def finish(self, number: int, how: str, times: int) -> None:
        """An attempt ends, and its node says so; twice, where the reply to the first COMMIT was
        lost.
        """
        process, claimed = self.held[number % len(self.held)]
        self._write(process, [self._end(process, claimed, how)], times)

    @does(which=WHICH, hows=st.lists(st.sampled_from(ENDS), min_size=1, max_size=3))
    def finish_all(self, which: str, hows: list[str]) -> None:
        """All that a node holds ends, and is written in one group."""
        self._finish_all(which, hows)

    @precondition(lambda self: bool(self.held))
    @does(number=NUMBER, count=st.sampled_from([1, 2, 3, 4, 5]))
    def say_how_far_it_is(self, number: int, count: int) -> None:
        """A node writes how many items one of its attempts has counted."""
        self._say(self.held[number % len(self.held)][1], count)

    def _say(self, claimed: Claimed, count: int) -> None:
        if (run := self._of(claimed)) is not None:
            self.model.say(run, claimed.fence, count)
        told = {
            "count": count,
            "total": None,
            "count_before": 0,
            "message": None,
            "progress_at": clock.now(),
        }
        self.world.write(
            attempts.write_progress,
            [{"id": claimed.id, "fence": claimed.fence, "rate": None, **told}],
        )

    # Living and dying

    @does(which=WHICH)
    def beat(self, which: str) -> None:
        """A node beats. If it was marked as stopped, it gives up its runs and registers again."""
        self._beat(self.processes[which])

    def _beat(self, process: Process) -> None:
        is_alive = self.world.write(nodes.beat, process.id, 0.0)
        assert is_alive == self.model.beat(process.id)
        if is_alive:
            return
        self.model.happened["came back"] += 1
        self.model.leave(process.id, "its node had lost its lease")
        self.model.nodes[process.id].is_stopped = False
        self.model.nodes[process.id].beats += 1
        self.world.write(_come_back, process)
        self._write(process, [(one, self._given_up(one)) for one in list(process.held.values())])

    @does(which=WHICH)
    def look_at_the_others(self, which: str) -> None:
        """A node notes the counters of the others."""
        self._look(self.processes[which])

    @precondition(lambda self: any(process.counters for process in self.processes.values()))
    @does(which=WHICH)
    def take_over(self, which: str) -> None:
        """A node rescues the runs of those whose counters have not moved since it noted them."""
        self._rescue(self.processes[which])

    @does(which=WHICH, beats=st.booleans())
    def outlive(self, which: str, beats: bool) -> None:
        """All other nodes have been silent for a lease. `beats`: the other one beats at the last
        moment.
        """
        self._outlive(which, beats)

    def _outlive(self, which: str, beats: bool) -> None:
        self._look(self.processes[which])
        if beats:
            self._beat(self.processes[OTHER[which]])
        self._rescue(self.processes[which])

    @does(which=WHICH, noticed=st.booleans())
    def crash(self, which: str, noticed: bool) -> None:
        """A process is killed, and another one starts. `noticed`: the other node rescues its
        runs.
        """
        self._join(which, self.processes[which].tasks)
        if noticed:
            self._inherit(OTHER[which])

    def _inherit(self, which: str) -> None:
        """A node takes over what the others ran."""
        self._look(self.processes[which])
        self._rescue(self.processes[which])
        self._claim(which, MANY)

    @does(which=WHICH, counts=st.lists(st.sampled_from([None, None, 1, 2]), min_size=3, max_size=6))
    def crash_again_and_again(self, which: str, counts: list[int | None]) -> None:
        """What a node runs goes from process to process, each of which dies; some of them have
        written progress.
        """
        for count in counts:
            process = self.processes[which]
            for claimed in process.held.values() if count is not None else ():
                self._say(claimed, count or 0)
            self._join(which, process.tasks)
            which = OTHER[which]
            self._inherit(which)
            self.compare()
            # What waits after a loss goes on.
            self.model.now = clock.advance(timedelta(seconds=120))
            self._claim(which, MANY)

    @does(which=WHICH, how=st.sampled_from(ENDS))
    def freeze(self, which: str, how: str) -> None:
        """A process is frozen for longer than its lease, and writes its outcomes after its runs
        were rescued.
        """
        self._look(self.processes[OTHER[which]])
        self._rescue(self.processes[OTHER[which]])
        self._claim(OTHER[which], MANY)
        self._finish_all(which, [how])

    @does(which=WHICH, in_time=st.booleans())
    def drain(self, which: str, in_time: bool) -> None:
        """A process stops in order, and another one starts. `in_time`: its attempts say themselves
        that they stop.
        """
        process = self.processes[which]
        self.world.write(process.node.drain)
        if in_time:
            self._write(
                process,
                [self._end(process, one, "interrupted") for one in list(process.held.values())],
            )
        self.model.leave(process.id, "the service stopped")
        self.model.nodes[process.id].is_stopped = True
        self.world.write(process.node.leave)
        self._join(which, process.tasks)


async def _fire_early(
    connection: AsyncConnection, process: Process, names: list[str], slot: datetime
) -> Fired:
    room = Capacity(MANY, MANY)
    fired = await firing.fire(
        connection, names, process.tasks, process.id, room, slot, {}, is_early=True
    )
    clock.advance(slot - clock.now())
    return fired


async def _come_back(connection: AsyncConnection, process: Process) -> None:
    now = clock.now()
    await orphans.interrupt_runs_of(connection, process.id, now, "its node had lost its lease")
    await nodes.register(connection, process.row())
