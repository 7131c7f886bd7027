"""What a person, or code, does to the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import precondition
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.cron.cron import schedule
from batch_system.batch.firing import pauses, task_sync
from batch_system.batch.firing.backfill import Backfill, interval_of
from batch_system.batch.firing.misfires import INSTANT
from batch_system.batch.ledger.states import Rank
from batch_system.batch.nodes import ledger_poll
from batch_system.batch.queue import cancel, enqueue, retry, unserved
from batch_system.batch.queue.requests import StartRequest, Starts
from batch_system.batch.retention.pruning import Pruner
from batch_system.batch.retention.retention import Keep
from batch_system.errors import InvalidParameters
from tests.model import plain
from tests.model.machine import CRON, ENDS, LIMITED, MANY, NUMBER, WHICH, Machine, does
from tests.model.plain import ACTIVE, Run


class People(Machine):
    """They know nothing of nodes: they write the ledger, and nodes follow it."""

    # To runs

    def _pick(self, number: int, states: Sequence[str]) -> Run | None:
        among = [run for run in self.model.runs if run.state in states]
        return among[number % len(among)] if among else None

    @does(
        number=NUMBER,
        states=st.sampled_from(
            [ACTIVE, ACTIVE, ("retrying",), ("running",), ("running",), plain.FINAL]
        ),
    )
    def cancel(self, number: int, states: Sequence[str]) -> None:
        """A person cancels a run."""
        if (run := self._pick(number, states)) is None:
            return
        note(f"# {run} is {run.state}")
        expected = self.model.ask_to_end(run, "cancelled by ann")
        state = self.world.write(cancel.request_cancel, run.id, "cancelled by ann", "ann")
        assert state == expected

    @precondition(
        lambda self: any(
            self.model.is_asked(run) for run in self.model.runs if run.state == "running"
        )
    )
    @does(which=WHICH)
    def see_requests(self, which: str) -> None:
        """A node cancels the attempts that somebody asked it to cancel, and has those of a paused
        task stop.
        """
        process = self.processes[which]
        requests = self.world.read(ledger_poll.read, process.id).requests
        running = [
            run for run in self.model.runs if (run.state, run.node) == ("running", process.id)
        ]
        cancelled = {(one.run, one.fence): one.reason for one in requests if not one.is_pause}
        paused = {(one.run, one.fence): one.reason for one in requests if one.is_pause}
        assert cancelled.keys() == {(run.id, run.fence) for run in running if run.cancel}
        assert paused.keys() == {(run.id, run.fence) for run in running if self.model.is_held(run)}
        ends = [
            (one, plain.Ending("cancelled", "cancelled", cancelled[key]))
            for key, one in process.held.items()
            if key in cancelled
        ]
        by_id = {run.id: run for run in running}
        ends += [
            (one, self.model.left(by_id[one.id], paused[key]))
            for key, one in process.held.items()
            if key in paused.keys() - cancelled.keys() and by_id[one.id].task.policy.rerun
        ]
        self._write(process, ends)

    @does(
        number=NUMBER,
        states=st.sampled_from([plain.FINAL, plain.FINAL, ACTIVE]),
        anew=st.booleans(),
    )
    def go_on_anyway(self, number: int, states: Sequence[str], anew: bool) -> None:
        """A person wants a run to go on that is over; `anew`: from the beginning, also where it has
        succeeded.
        """
        if (run := self._pick(number, states)) is None:
            return
        note(f"# {run} is {run.state}")
        self.by_a_person = True
        states = plain.FINAL if anew else ("failed", "skipped", "cancelled")
        expected = self.model.reopen(run, plain.BY_HAND, states, anew)
        assert (self._begin_anew(run) if anew else self._retry(run)) == expected

    @precondition(lambda self: any(run.waits for run in self.model.runs))
    @does(number=NUMBER, which=WHICH, runs_first=st.booleans())
    def go_on_with_what_comes_after(self, number: int, which: str, runs_first: bool) -> None:
        """A person runs something again that others have waited for, and these after it.

        `runs_first`: before that a node runs all that it can, and what opens by that, all of it
        with success.
        """
        for _ in range(2 * runs_first):
            self._claim(which, MANY)
            self._finish_all(which, ["succeeded"])
            self._open(which)
            self.compare()
        among = self.model.awaited()
        if not among:
            return
        run = among[number % len(among)]
        note(f"# {run} is {run.state}")
        self.by_a_person = True
        world, after = self.world, self.world.read(retry.comes_after, run.id)
        ids = [each for theirs in after.values() for each in theirs]
        assert sorted(ids) == sorted(each.id for each in self.model.coming_after(run))
        expected = self.model.again_with_what_comes_after(run)
        again = world.run(
            retry.again(world.ledger, world.application, [run.id], Rank.MANUAL, "ann", ids)
        )
        assert bool(again) == expected

    def _retry(self, run: Run) -> bool:
        try:
            self.world.write(retry.retry, run.id, "ann")
        except InvalidParameters:
            return False
        return True

    def _begin_anew(self, run: Run) -> bool:
        world = self.world
        return bool(
            world.run(retry.again(world.ledger, world.application, [run.id], Rank.MANUAL, "ann"))
        )

    # To tasks

    def _task(self, number: int) -> plain.Task:
        return list(self.model.tasks.values())[number % len(self.model.tasks)]

    def _startable(self, name: str) -> enqueue.Startable:
        return enqueue.Startable.of(self.tasks[name])

    @does(
        number=NUMBER,
        key=st.sampled_from([None, None, "a", "b"]),
        value=st.sampled_from([None, "a", "b", "c"]),
    )
    def start(self, number: int, key: str | None, value: str | None) -> None:
        """Code starts a run; of one key once. Only a limit has a parameter."""
        task = self._task(number)
        if task.removed_at is not None:
            return  # it is refused
        params = {"value": value} if value and task.name == LIMITED else None
        run = self.model.start(task, key, value or "a")
        startable = self._startable(task.name)
        id_ = self.world.write(enqueue.enqueue, startable, params, None, "ann", key)
        assert run.id in ("", id_)
        run.id = id_

    @does(number=NUMBER, seconds=st.sampled_from([1, 60]))
    def start_later(self, number: int, seconds: int) -> None:
        """Code starts a run that begins at a later instant."""
        task = self._task(number)
        if task.removed_at is not None:
            return
        run = self.model.start_later(task, seconds)
        self._write_starts(
            [run], Starts((StartRequest(self._startable(task.name), None, delay=seconds),))
        )

    @does(
        number=NUMBER,
        other=NUMBER,
        size=st.sampled_from([0, 1, 2, 3]),
        on=st.sampled_from(["success", "end"]),
    )
    def start_group(self, number: int, other: int, size: int, on: str) -> None:
        """Code starts runs and one that follows them."""
        self._start_group(self._task(number), self._task(other), size, on, None)

    @precondition(lambda self: bool(self._running_members()))
    @does(
        number=NUMBER,
        other=NUMBER,
        size=st.sampled_from([1, 2]),
        on=st.sampled_from(["success", "end"]),
    )
    def grow_group(self, number: int, other: int, size: int, on: str) -> None:
        """A member that runs starts a group within its own."""
        among = self._running_members()
        outer = among[number % len(among)].awaited_by
        self._start_group(self._task(number), self._task(other), size, on, outer)

    @does(
        number=NUMBER,
        which=WHICH,
        how=st.sampled_from(ENDS),
        on=st.sampled_from(["success", "end"]),
    )
    def run_a_group(self, number: int, which: str, how: str, on: str) -> None:
        """Code starts a group, a node runs its members, of which one starts another, and one of
        them ends somehow.
        """
        self._start_group(self._task(number), self._task(number + 1), 2, on, None)
        self.compare()
        self._claim(which, MANY)
        if self._running_members():
            self._join_group(number, number + 2)
        self.compare()
        self._finish_all(which, [how, "succeeded"])
        self._claim(which, MANY)
        self._finish_all(which, ["succeeded"])
        self._open(which)

    @precondition(lambda self: bool(self._running_members()))
    @does(number=NUMBER, other=NUMBER)
    def join_group(self, number: int, other: int) -> None:
        """A member that runs starts another member."""
        self._join_group(number, other)

    def _running_members(self) -> list[Run]:
        """The runs whose code may start others in their group. A part is in no group."""
        return [
            run
            for run in self.model.runs
            if run.state == "running" and run.awaited_by and run.part is None
        ]

    def _join_group(self, number: int, other: int) -> None:
        among = self._running_members()
        group, task = among[number % len(among)].awaited_by, self._task(other)
        if group is None or task.removed_at is not None:
            return
        run = self.model.start(task, None)
        run.awaited_by = group
        self.model.happened["joined late"] += 1
        starts = Starts((StartRequest(self._startable(task.name), None),))
        run.id = str(self.world.write(enqueue.write, starts, "ann", None, group.id))

    def _start_group(
        self, task: plain.Task, then: plain.Task, size: int, on: str, outer: Run | None
    ) -> None:
        if task.removed_at is not None or then.removed_at is not None:
            return
        made = self.model.start_group(task, then, size, on, outer)
        member, follow_up = (
            StartRequest(self._startable(each.name), None) for each in (task, then)
        )
        self._write_starts(
            made, Starts((member,) * size, follow_up, on), outer.id if outer else None
        )

    def _write_starts(self, made: list[Run], starts: Starts, outer: str | None = None) -> None:
        """`made`: those of the model; the follow-up is the first."""
        first = str(self.world.write(enqueue.write, starts, "ann", None, outer))
        rows = self.world.look().runs.values()
        ids = [first, *sorted(row["id"] for row in rows if row["awaited_by"] == first)]
        for run, id_ in zip(made, ids, strict=True):
            run.id = id_

    @does(number=NUMBER, minutes=st.sampled_from([1, 3]), redo=st.booleans())
    def backfill(self, number: int, minutes: int, redo: bool) -> None:
        """A person wants runs for the last minutes. `redo`: those that are over go again."""
        task = self._task(number)
        if task.removed_at is not None:
            return  # it has no schedule
        since = clock.now() - timedelta(minutes=minutes)
        self.by_a_person = True  # what was closed because of a slot waits again
        self.model.backfill(task, since, redo)
        filling = Backfill(
            self.world.ledger, self.world.application, self._startable(task.name), "ann", redo
        )
        interval = self.world.read(interval_of, task.name, since, clock.now())
        self.world.run(filling.make(interval))

    @does(number=NUMBER, loaded=st.booleans())
    def pause_or_resume(self, number: int, loaded: bool) -> None:
        """A person pauses a task, or ends its pause; `loaded`: on a node, and not by a command that
        has no tasks.
        """
        task = self._task(number)
        if task.paused_by is not None:
            self.model.resume(task)
            self.world.write(pauses.resume, task.name)
            return
        tasks, node = (self.tasks, self.processes["A"].id) if loaded else ({}, "")
        self.model.pause(task, "ann", loaded)
        self.world.write(pauses.pause, task.name, "ann", tasks, node)

    @does(number=NUMBER, period=st.sampled_from(sorted(CRON)))
    def deploy(self, number: int, period: int) -> None:
        """A has another schedule for a task, and puts it into force."""
        task = self._task(number)
        if task.removed_at is not None:
            return
        self.model.set_period(task, period)
        wanted = {task.name: schedule(CRON[period], "UTC")}
        self.world.write(task_sync.set_schedules, wanted, self.tasks, self.processes["A"].id)

    @does(number=NUMBER)
    def remove_or_restore(self, number: int) -> None:
        """The file of a task is gone, or back in A."""
        task = self._task(number)
        if task.removed_at is None:
            self._remove(task)
            return
        self.model.restore(task)
        period = task.spans[-1].period
        self.world.write(task_sync.record_tasks, {task.name: self.tasks[task.name]}, clock.now())
        wanted = {task.name: schedule(CRON[period], "UTC")}
        self.world.write(task_sync.set_schedules, wanted, self.tasks, self.processes["A"].id)

    def _remove(self, task: plain.Task) -> None:
        self.model.remove(task)
        assert self.world.write(task_sync.remove_gone, [task.name], _nobody) == [task.name]

    @precondition(lambda self: any(run.state in plain.WAITING for run in self.model.runs))
    @does(number=NUMBER, first=st.sampled_from(plain.WAITING))
    def fail_unserved(self, number: int, first: str) -> None:
        """A service fails runs that have waited for 24 hours for removed tasks. The task of one
        such run is removed.
        """
        run = self._pick(number, [first]) or self._pick(number, plain.WAITING)
        if run is not None and run.task.removed_at is None:
            self._remove(run.task)
            self.compare()
        self.model.now = clock.advance(unserved.GRACE + timedelta(seconds=1))
        assert self.world.run(
            unserved.fail_unserved(self.world.ledger)
        ) == +self.model.fail_unserved(unserved.GRACE)

    @does(minutes=st.sampled_from([1, 3]), per_task=st.sampled_from([1, 3]))
    def prune(self, minutes: int, per_task: int) -> None:
        """What ended so many minutes ago leaves the ledger, and the account begins later."""
        before = clock.now() - timedelta(minutes=minutes)
        keep = Keep(minutes / 1440, per_task)
        self.world.run(Pruner(self.world.ledger, self.world.application, keep, pause=0).prune())
        kept = self.world.look().runs.keys()
        gone = self.model.prune(before, per_task, kept)
        assert not [run for run in gone if run.awaited_by is not None and run.awaited_by.id in kept]
        for name, row in self.world.look().tasks.items():
            task = self.model.tasks[name]
            latest = max(
                [
                    before,
                    task.accounted_from,
                    *(run.slot + INSTANT for run in gone if run.task is task and run.slot),
                ]
            )
            assert task.accounted_from <= row["accounted_from"] <= latest
            task.accounted_from = row["accounted_from"]

    @does()
    def account(self) -> None:
        """The account says of every slot what the model says."""
        self._account()


async def _nobody(_: AsyncConnection) -> set[str]:
    """The tasks that some live node has."""
    return set()
