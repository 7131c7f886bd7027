"""What becomes of partitioned runs: steps that are seldom chosen one after the other. All other
rules play them too.
"""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition

from batch_system.batch.queue import cancel, enqueue
from tests.model import plain
from tests.model.machine import (
    CRON,
    ENDS,
    MANY,
    NAMES,
    NUMBER,
    OTHER,
    OVERLAPS,
    WHICH,
    does,
    limited_policies,
    partitioned_policies,
    policies,
    waiting_policies,
)
from tests.model.people import People
from tests.model.plain import BAD, Policy, Run

SUMS = "sums"
HOWS = st.lists(st.sampled_from(["succeeded", *ENDS]), min_size=1, max_size=3)


class Partitions(People):
    """A run is split by its first attempt, waits for its parts, and is joined by its last one.

    There are few other tasks, so that much happens to the partitioned one.
    """

    @initialize(
        policies=st.tuples(policies("skip"), partitioned_policies()),
        periods=st.tuples(*[st.sampled_from(sorted(CRON))] * 2),
        lacks=st.sampled_from([None, "skip"]),
    )
    def begin(
        self, policies: tuple[Policy, ...], periods: tuple[int, ...], lacks: str | None
    ) -> None:
        """Two nodes join, with a partitioned task and another one. `lacks`: the task that B has
        not.
        """
        self._begin(("skip", SUMS), policies, periods, lacks)

    def _runs(self, *states: str) -> list[Run]:
        """Those that were split."""
        return [run for run in self.model.runs if run.is_split and run.state in states]

    def _start_one(self) -> Run | None:
        task = self.model.tasks[SUMS]
        if task.removed_at is not None or task.paused_by is not None:
            return None
        run = self.model.start(task, None)
        run.id = self.world.write(
            enqueue.enqueue, enqueue.Startable.of(self.tasks[SUMS]), None, None, "ann"
        )
        return run

    @does(which=WHICH, hows=HOWS)
    def split_up(self, which: str, hows: Sequence[str]) -> None:
        """A run is split, its first parts end in some ways, and the nodes look what has become of
        it.
        """
        if self._start_one() is not None:
            self._go_on_once(which)
            self._work(which, hows)

    @does(which=WHICH)
    def live_through(self, which: str) -> None:
        """A run is split, a part is cancelled, a person retries it, and runs it from the beginning,
        and cancels it.
        """
        if (run := self._start_one()) is None:
            return
        self._end_well(which)
        if run.state != "waiting" or not self.model.parts(run):
            return
        part = self.model.parts(run)[0]
        self._cancel(part)
        self._retry_part(part, anew=False)
        self.compare()
        self._cancel(part)
        self._open(which)
        for _ in range(4):
            self._go_on_once(which)
        self._retry_split(run, which, ["succeeded"], anew=False)
        for _ in range(4):
            self._go_on_once(which)
        self.by_a_person = True
        assert self._begin_anew(run) == self.model.reopen(
            run, plain.BY_HAND, plain.FINAL, anew=True
        )
        self.compare()
        self._end_well(which)
        self._cancel(run)

    def _end_well(self, which: str) -> None:
        """A node ends all that it can claim with success."""
        self._claim(which, MANY)
        self._finish_all(which, ["succeeded"])
        self.compare()

    def _cancel(self, run: Run) -> None:
        expected = self.model.ask_to_end(run, "cancelled by ann")
        assert (
            self.world.write(cancel.request_cancel, run.id, "cancelled by ann", "ann") == expected
        )

    def _go_on_once(self, which: str) -> None:
        """Both nodes claim, end what they hold well, or give it up if they are asked to, and look
        what is over.
        """
        for each in (which, OTHER[which]):
            self._claim(each, MANY)
            process = self.processes[each]
            runs = [(claimed, self._of(claimed)) for claimed in process.held.values()]
            ends = [
                (claimed, "interrupted" if run and run.cancel else "succeeded")
                for claimed, run in runs
            ]
            self._write(process, [self._end(process, *end) for end in ends])
        self._open(which)
        self.compare()

    def _retry_split(self, run: Run, which: str, hows: Sequence[str], anew: bool) -> None:
        """A person retries a run that was split: its parts that did not succeed run again, or
        (`anew`) new ones.
        """
        note(f"# {run} is {run.state}")
        self.by_a_person = True
        good = {
            part.id: part.fence
            for part in self.model.parts(run)
            if part.state == "succeeded" and not anew
        }
        expected = self.model.reopen(run, plain.BY_HAND, plain.FINAL if anew else BAD, anew)
        assert (self._begin_anew(run) if anew else self._retry(run)) == expected
        self.compare()
        self._go_on_once(which)
        self._work(which, hows)
        rows = self.world.look().runs
        assert good == {id_: rows[id_]["fence"] for id_ in good}, (
            "a part that had succeeded was run again"
        )

    @precondition(
        lambda self: any(
            run.part is not None and run.state in plain.ACTIVE for run in self.model.runs
        )
    )
    @does(which=WHICH, hows=HOWS)
    def work_on_parts(self, which: str, hows: Sequence[str]) -> None:
        """Both nodes work on parts: what they hold ends in some ways, and the runs of which all is
        over go on.
        """
        self._work(which, hows)

    def _work(self, which: str, hows: Sequence[str]) -> None:
        for each in (which, OTHER[which]):
            self._claim(each, 1)
            self._claim(OTHER[each], MANY)
            self._finish_all(each, hows)
            self._open(each)
            self.compare()

    @precondition(lambda self: bool(self._runs("failed", "cancelled")))
    @does(which=WHICH, number=NUMBER, hows=HOWS)
    def run_bad_parts_again(self, which: str, number: int, hows: Sequence[str]) -> None:
        """A person retries a run that was split, and is over without success."""
        among = self._runs("failed", "cancelled")
        self._retry_split(among[number % len(among)], which, hows, anew=False)

    @precondition(lambda self: bool(self._runs("waiting")))
    @does(number=NUMBER)
    def cancel_a_split_run(self, number: int) -> None:
        """A person cancels a run that waits for its parts: these are cancelled too."""
        among = self._runs("waiting")
        self._cancel(among[number % len(among)])

    @precondition(
        lambda self: any(
            run.part is not None and run.state in plain.FINAL for run in self.model.runs
        )
    )
    @does(number=NUMBER, anew=st.booleans())
    def run_a_part_again(self, number: int, anew: bool) -> None:
        """A person retries a part, which is possible while its run waits for it and others."""
        among = [
            run for run in self.model.runs if run.part is not None and run.state in plain.FINAL
        ]
        among = [
            run for run in among if run.awaited_by is not None and run.awaited_by.state == "waiting"
        ] or among
        part = among[number % len(among)]
        note(f"# {part} is {part.state}")
        self._retry_part(part, anew)

    def _retry_part(self, part: Run, anew: bool) -> None:
        self.by_a_person = True
        expected = self.model.reopen(part, plain.BY_HAND, plain.FINAL if anew else BAD, anew)
        assert (self._begin_anew(part) if anew else self._retry(part)) == expected


class Everything(Partitions):
    """A partitioned task among all others."""

    @initialize(
        policies=st.tuples(
            *map(policies, OVERLAPS),
            waiting_policies(),
            limited_policies(),
            partitioned_policies(),
        ),
        periods=st.tuples(*[st.sampled_from(sorted(CRON))] * (len(NAMES) + 1)),
        lacks=st.sampled_from([None, OVERLAPS[0], "after"]),
    )
    def begin(
        self, policies: tuple[Policy, ...], periods: tuple[int, ...], lacks: str | None
    ) -> None:
        """Two nodes join, with a task of each kind. `lacks`: the task that B has not."""
        self._begin((*NAMES, SUMS), policies, periods, lacks)
