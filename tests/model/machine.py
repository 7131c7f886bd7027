"""The machine: hypothesis chooses what two nodes and a person do; the ledger and the model do it
side by side.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import BaseTask, Limit, Part, PartitionedTask, Retry, TaskRegistry, clock
from batch_system.batch.account.account import AccountedSlot, AccountFinding, accounts
from batch_system.batch.account.slots import Kind
from batch_system.batch.execution.attempt import Attempt
from batch_system.batch.execution.ending import Ending
from batch_system.batch.execution.outcomes import Group, WriteBuffer
from batch_system.batch.firing import firing, task_sync, waiting
from batch_system.batch.firing.firing import Fired
from batch_system.batch.ledger import nodes
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.states import RunState
from batch_system.batch.nodes import ledger_poll, orphans
from batch_system.batch.nodes.node import Node
from batch_system.batch.queue import claiming, enqueue, upstream_results
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.queue.concurrency import Head
from batch_system.batch.tasks.after import After
from batch_system.batch.tasks.declaration import Missed
from batch_system.batch.tasks.partitions import Stage, stage_of
from batch_system.batch.tasks.registry import Task
from batch_system.concurrency.thread_pool import ThreadPool
from batch_system.database import types
from tests.batch.ledger_world import make_task
from tests.model import plain
from tests.model.checks import check, name_runs, wrong_entries
from tests.model.plain import Model, Policy, Run
from tests.model.world import World

START = datetime(2026, 3, 10, 12, 0, 30, tzinfo=UTC)
CRON = {20: "*/20 * * * * *", 60: "* * * * *", 120: "*/2 * * * *"}
ENDS = ("succeeded", "failed", "timed out", "interrupted")
MANY = 99
THREADS = ThreadPool(1)

WHICH = st.sampled_from("AB")
OTHER = {"A": "B", "B": "A"}
NUMBER = st.integers(0, 15)
SECONDS = st.sampled_from([0, 0, 0, 1, 20, 30, 59, 61])


OVERLAPS = ("skip", "wait", "replace", "allow")
LIMITED = "limit"
NAMES = (*OVERLAPS, "after", LIMITED)
"""Of the tasks: one of each overlap policy, one whose slots wait for those of two others, and one
with a limit for each value of its parameter.
"""


@st.composite
def policies(draw: st.DrawFn, overlap: str) -> Policy:
    return Policy(
        overlap=overlap,
        max_running=draw(st.sampled_from([None, 2])),
        max_waiting=draw(st.sampled_from([1, 2])) if overlap == "wait" else 1,
        missed=draw(st.sampled_from(["once", "all", "skip"])),
        max_age=draw(st.sampled_from([86_400, 150])),
        max_count=draw(st.sampled_from([None, 2])),
        attempts=draw(st.sampled_from([1, 2, 3])),
        rerun=draw(st.booleans()),
        priority=draw(st.sampled_from([0, 5])),
    )


@st.composite
def waiting_policies(draw: st.DrawFn) -> Policy:
    after = plain.After(
        ("skip", "wait"),
        draw(st.sampled_from([86_400, 100])),
        draw(st.sampled_from(["success", "end"])),
    )
    overlap = draw(st.sampled_from(OVERLAPS))
    return replace(draw(policies(overlap)), after=after)


@st.composite
def limited_policies(draw: st.DrawFn) -> Policy:
    policy = replace(draw(policies("allow")), max_running=None)
    return replace(policy, limit=draw(st.sampled_from([1, 2])))


@st.composite
def partitioned_policies(draw: st.DrawFn) -> Policy:
    overlap = draw(st.sampled_from(OVERLAPS))
    shape = {
        "parts": draw(st.sampled_from([3, 2, 1, 0])),
        "parallel": draw(st.sampled_from([2, 1])),
    }
    return replace(draw(policies(overlap)), **shape, fail_fast=draw(st.booleans()))


def real_task(name: str, policy: Policy, period: int) -> Task:
    missed = Missed(policy.missed, timedelta(seconds=policy.max_age), policy.max_count)  # type: ignore[arg-type]
    same = {
        key: getattr(policy, key)
        for key in ("overlap", "max_running", "max_waiting", "rerun", "priority")
    }
    retry = Retry(policy.attempts, wait=30, factor=1, jitter=0)
    after = (
        After(*policy.after.tasks, within=policy.after.within, on=policy.after.on)
        if policy.after
        else None
    )  # type: ignore[arg-type]
    same |= {"missed": missed, "retry": retry, "after": after}
    if policy.limit is not None:
        return make_task(name, CRON[period], _of_value, **same, limit=Limit(policy.limit, "value"))
    if policy.parts is None:
        return make_task(name, CRON[period], **same)
    same |= {
        "parallel": policy.parallel,
        "fail_fast": policy.fail_fast,
        "split": _nothing,
        "work": _work,
    }
    TaskRegistry.register(
        type("Sums", (PartitionedTask,), {"name": name, "schedule": CRON[period], **same})
    )
    return TaskRegistry.get(name)


async def _of_value(self: BaseTask, value: str = "a") -> None: ...


async def _nothing(self: PartitionedTask) -> None: ...


async def _work(self: PartitionedTask, part: Part) -> None: ...


def does(**choices: Any) -> Callable[[Callable[..., None]], Any]:
    """A rule: some time passes, the method does its thing, and the ledger is compared with the
    model.

    (An `invariant` would be told of after each line of an example.)
    """

    def decorate(method: Callable[..., None]) -> Any:
        @functools.wraps(method)
        def step(self: Machine, after: int, **chosen: Any) -> None:
            self.model.now = clock.advance(timedelta(seconds=after))
            note(f"# it is {self.model.now:%H:%M:%S}")
            method(self, **chosen)
            self.compare()

        return rule(after=SECONDS, **choices)(step)

    return decorate


def change(old: str, new: str) -> str:
    """What is counted when the state of a run changes so."""
    return f"{old} -> {new}"


class Process:
    """A process of the service, as far as the ledger meets it: what it has loaded, believes and
    holds.
    """

    def __init__(self, url: str, tasks: dict[str, Task]) -> None:
        self.node = Node(url, beat_seconds=5, lease_seconds=30)
        self.id = self.node.id
        self.tasks = tasks
        self.buffer = WriteBuffer(self.id)
        self.held: dict[tuple[str, int], Claimed] = {}
        self.counters: dict[str, int] = {}
        """Those of the other nodes, when it last looked at them."""
        self.heads: list[Head] = []
        """What it saw when it last looked for something to claim."""

    def row(self) -> dict[str, Any]:
        at = clock.now()
        known = {"host": "here", "pid": 1, "version": "1", "started_at": at, "seen_at": at}
        return {"id": self.id, **known, "draining": False, "tasks": sorted(self.tasks)}


class Machine(RuleBasedStateMachine):
    """Two nodes, A and B, and a person; the rules are in nodes.py, beside.py and people.py.

    Each does one thing to the ledger and the same to the model.
    """

    world: ClassVar[World]
    happened: ClassVar[Any]

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        self._stack.enter_context(TaskRegistry.restored())
        self._stack.enter_context(clock.moved(START))
        numbers = itertools.count()
        counting = SimpleNamespace(randbits=lambda bits: next(numbers))
        # Else the same choices may do something else.
        self._stack.enter_context(patch.object(types, "secrets", counting))
        TaskRegistry.clear()
        self.world.clear()
        self.model = Model(START)
        self.processes: dict[str, Process] = {}
        self.url = self.world.ledger.url.render_as_string(hide_password=False)
        self.before = self.world.look()
        self.by_a_person = False

    def teardown(self) -> None:
        try:
            if self.processes:
                self._account()
        finally:
            self.happened.update(self.model.happened)
            self.happened.update(
                {change(*pair): number for pair, number in self.before.changes.items()}
            )
            self.happened["examples"] += 1
            self._stack.close()

    @initialize(
        policies=st.tuples(*map(policies, OVERLAPS), waiting_policies(), limited_policies()),
        periods=st.tuples(*[st.sampled_from(sorted(CRON))] * len(NAMES)),
        lacks=st.sampled_from([None, OVERLAPS[0], "after"]),
    )
    def begin(
        self, policies: tuple[Policy, ...], periods: tuple[int, ...], lacks: str | None
    ) -> None:
        """Two nodes join, with a task of each overlap policy, one that waits and one with a limit.
        `lacks`: the task that B has not.
        """
        self._begin(NAMES, policies, periods, lacks)

    def _begin(
        self,
        names: tuple[str, ...],
        policies: tuple[Policy, ...],
        periods: tuple[int, ...],
        lacks: str | None,
    ) -> None:
        self.tasks = {
            n: real_task(n, p, each) for n, p, each in zip(names, policies, periods, strict=True)
        }
        for name, policy, period in zip(names, policies, periods, strict=True):
            self.model.know(name, policy, period)
        self.world.write(task_sync.record_tasks, self.tasks, clock.now())
        self._join("A", self.tasks)
        self.world.write(
            task_sync.set_schedules,
            {n: t.schedule for n, t in self.tasks.items()},
            self.tasks,
            self.processes["A"].id,
        )
        self._join("B", {n: t for n, t in self.tasks.items() if n != lacks})
        self.compare()

    def _join(self, which: str, tasks: dict[str, Task]) -> None:
        process = self.processes[which] = Process(self.url, tasks)
        self.world.write(nodes.register, process.row())
        self.model.nodes[process.id] = plain.Node(list(tasks))

    def compare(self) -> None:
        now = self.world.look()
        assert self.world.in_wrong_order == []
        check(self.model, self.before, now, self.by_a_person)
        self.model.resumed.clear()
        for which, process in self.processes.items():
            held = {
                (r["id"], r["fence"])
                for r in now.runs.values()
                if (r["state"], r["node"]) == ("running", process.id)
            }
            assert held <= process.held.keys(), (
                f"{which} runs what it knows nothing of: {held - process.held.keys()}"
            )
        self.before, self.by_a_person = now, False
        self.happened["steps"] += 1

    # What both do: on the ledger, and on the model

    def _fire(self, which: str, names: Collection[str], room: int) -> None:
        process = self.processes[which]
        self.model.fire(names, process.id, room)
        self._fire_on(process, set(names), Capacity(room, room))

    def _fire_on(self, process: Process, again: set[str], room: Capacity) -> None:
        while again:
            fired: Fired = self.world.write(firing.fire, again, process.tasks, process.id, room)
            self._take(process, fired.claimed)
            again = {name for name, at in fired.again_at.items() if at <= fired.now}
        name_runs(self.model, self.world.look())

    def _claim(self, which: str, most: int) -> None:
        process = self.processes[which]
        claimed: list[Claimed] = []
        while len(claimed) < most and (found := self._claim_some(process, most - len(claimed))):
            claimed += found
        ids = [one.id for one in claimed]
        self.model.claim_as(process.tasks.keys(), process.id, most, ids)
        self._take(process, claimed)

    def _claim_some(
        self, process: Process, most: int, tasks: Mapping[str, Task] | None = None
    ) -> list[Claimed]:
        """One by one, or all: of a few, each task gets a share, and slots that wait hide others
        until the next turn.
        """
        if most < MANY // 2:
            most = 1
        found: list[Claimed] = self.world.write(
            claiming.take, tasks or process.tasks, process.id, Capacity(most, most)
        )[0]
        return found

    def _open(self, which: str) -> None:
        loaded = self.processes[which].tasks
        expected = self.model.look(loaded.keys())
        assert self.world.write(waiting.open_and_close, loaded, clock.now()).number == expected

    def _take(self, process: Process, claimed: Sequence[Claimed]) -> None:
        """It works on these now. What it holds of an older attempt of one of them it gives up."""
        mine = {one.id for one in claimed}
        old = [one for one in process.held.values() if one.id in mine]
        self._write(process, [(one, self._given_up(one)) for one in old])
        process.held |= {
            (one.id, one.fence): one for one in sorted(claimed, key=lambda one: one.id)
        }

    def _of(self, claimed: Claimed) -> Run | None:
        """None: it was pruned."""
        return next((run for run in self.model.runs if run.id == claimed.id), None)

    def _given_up(self, claimed: Claimed) -> plain.Ending:
        run = self._of(claimed)
        return (
            self.model.left(run, "its node could not renew its lease")
            if run
            else plain.Ending("failed", "failed")
        )

    def _write(
        self, process: Process, ends: Sequence[tuple[Claimed, plain.Ending]], times: int = 1
    ) -> None:
        """A node writes the outcomes of attempts in groups, each several times if it got no
        reply.
        """
        endings = {(one.id, one.fence): (one, ending) for one, ending in ends}
        group = self._group(process, ends)
        while group:
            self.world.run(group.prepare(self.world.ledger.kind))
            for _ in range(times):
                bounced = {outcome.id for outcome in self.world.write(_write_group, group)}
                written = [endings[outcome.id, outcome.fence] for outcome in group.outcomes]
                expected = {one.id for one, ending in written if not self._ends(one, ending)}
                assert bounced == expected, f"bounced: {bounced}, and should be {expected}"
            if any(outcome.split is not None for outcome in group.outcomes):
                name_runs(self.model, self.world.look())
            group = process.buffer.take(())

    def _group(self, process: Process, ends: Sequence[tuple[Claimed, plain.Ending]]) -> Group:
        """End these attempts on a node; returns the group that it has to write first."""
        for claimed, ending in ends:
            attempt = Attempt(claimed, self.tasks[claimed.task], THREADS, lambda *_: None)
            wait = ending.wait if ending.state == "retrying" else None
            parts = (
                [{"number": number} for number in range(ending.parts)]
                if ending.parts is not None
                else None
            )
            real = Ending(
                RunState(ending.state), ending.outcome, ending.reason, wait=wait, parts=parts
            )
            process.buffer.add_ending(attempt, real)
            del process.held[claimed.id, claimed.fence]
        return process.buffer.take(())

    def _ends(self, claimed: Claimed, ending: plain.Ending) -> bool:
        run = self._of(claimed)
        return run is not None and self.model.finish(run, claimed.fence, claimed.attempt, ending)

    def _end(self, process: Process, claimed: Claimed, how: str) -> tuple[Claimed, plain.Ending]:
        run = self._of(claimed)
        stage = stage_of(self.tasks[claimed.task].partition, claimed)
        if run is not None and stage == Stage.JOIN and self._is_held_by(process, claimed):
            self._check_join(run)
        ending = (
            self.model.ending(run, claimed.attempt, how, stage)
            if run
            else plain.Ending("failed", "failed")
        )
        note(f"# {run} under {claimed.fence} ends: {ending}")
        return claimed, ending

    def _is_held_by(self, process: Process, claimed: Claimed) -> bool:
        run = self._of(claimed)
        return run is not None and (run.state, run.node, run.fence) == (
            "running",
            process.id,
            claimed.fence,
        )

    def _check_join(self, run: Run) -> None:
        """The attempt reads whether it may join, and then its parts: each of them once, in their
        order.
        """
        are_over = self.world.run(self._read_parts(run.id))
        assert are_over == self.model.has_succeeded_parts(run)

    async def _read_parts(self, run: str) -> bool:
        enqueue.use_service(self.world.ledger, lambda: None)
        try:
            are_over = await upstream_results.are_parts_over(run)
            found = [
                (done.part, done.run, done.state)
                async for done in await upstream_results.read(run, True)
            ]
        finally:
            enqueue.use_no_service()
        parts = sorted(
            (each for each in self.model.runs if each.is_part_of(run)),
            key=lambda each: each.part or 0,
        )
        assert found == [(each.part, each.id, each.state) for each in parts]
        return are_over

    def _finish_all(self, which: str, hows: Sequence[str]) -> None:
        process = self.processes[which]
        each = zip(list(process.held.values()), itertools.cycle(hows), strict=False)
        self._write(process, [self._end(process, claimed, how) for claimed, how in each])

    @property
    def held(self) -> list[tuple[Process, Claimed]]:
        return [
            (process, one) for process in self.processes.values() for one in process.held.values()
        ]

    def _look(self, process: Process) -> None:
        found = {
            node.id: (node.beats, node.is_stopped)
            for node in self.world.read(ledger_poll.read, process.id).others
        }
        assert found == self.model.others(process.id)
        process.counters = {node: beats for node, (beats, _) in found.items()}

    def _rescue(self, process: Process) -> None:
        gone = self.world.write(orphans.rescue, process.counters, clock.now())
        assert sorted(gone) == sorted(self.model.rescue(process.counters))

    def _account(self) -> None:
        entries: dict[str, dict[datetime, str]] = {name: {} for name in self.model.tasks}

        def see(entry: AccountedSlot) -> None:
            entries[entry.task][entry.slot] = str(entry.kind)

        complete = self.world.read(_account, see)
        problems = [
            p
            for task in self.model.tasks.values()
            for p in wrong_entries(self.model, task, entries[task.name])
        ]
        assert not problems and not complete, (complete, problems)


async def _write_group(connection: AsyncConnection, group: Group) -> list[Outcome]:
    return await group.write(connection)


async def _account(
    connection: AsyncConnection, see: Callable[[AccountedSlot], None]
) -> list[AccountFinding]:
    """What the accounts of all tasks find wrong."""
    found = [each async for each in accounts(connection, START, see=see)]
    fine = (Kind.DUE, Kind.LATE)
    return [
        finding for account in found for finding in account.findings if finding.kind not in fine
    ]
