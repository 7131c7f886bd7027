"""Turns: in which order the keys of limits are served.

A task with a limit has a queue for each value of the limit's parameter. A look at the ledger goes
from queue to queue through the index, and begins behind the queue that was served last, so that no
key waits for the runs of a key that has many.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import repeat, zip_longest
from math import ceil

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import key_counts, rates
from batch_system.batch.ledger.states import Rank, RunState
from batch_system.batch.queue import concurrency
from batch_system.batch.queue.concurrency import Head, free_lanes
from batch_system.batch.queue.key_queues import (
    Conditions,
    Queue,
    last_served,
    read_queues,
    read_queues_of_rank,
)
from batch_system.batch.tasks.limit import Queueing
from batch_system.database import name_locks

MOST_QUEUES = 500
"""How many queues a look reads at once."""
LEAST_QUEUES = 20
"""How many of each task at least."""
MOST_FIRST = 100
"""How many runs that go before the others of their queue are read of each task at least, because
those of one key may hide those of others.
"""
MOST_LOOKS = 4
"""How many times so many queues are read while nothing can start in those before."""


class Turns:
    """Which queue was served last, by the name of the task. A node has one, and forgets it with its
    process.
    """

    are_locked = False
    """Whether another node claimed runs of a limit with a total, or of a rate, during the last
    look.
    """

    def __init__(self) -> None:
        self._served: dict[str, str] = {}
        self.places: dict[str, list[int]] = {}
        """The free places of the rates that the last look has read, by bucket."""
        self.numbers: dict[str, int] = {}
        """How many queues of each task the last look has read."""
        self.looks = 0
        """How many looks have found runs that go before the others of their queue."""

    async def begin(self, connection: AsyncConnection, tasks: Iterable[str]) -> None:
        """Go on where the other nodes are with these tasks, the first time that they are looked at.
        Otherwise each new process would begin with the same keys.
        """
        if new := [task for task in tasks if task not in self._served]:
            self._served |= dict.fromkeys(new, "") | await last_served(connection, new)

    def after(self, task: str) -> str:
        """The queue behind which the next look at this task begins."""
        return self._served.get(task, "")

    def skip(self, task: str, queue: str) -> None:
        """Go on behind this queue, because nothing can start in those up to it."""
        self._served[task] = queue

    def serve(self, heads: Iterable[Head]) -> None:
        """Remember that these runs begin. They are in the order of their turns, except those that
        go before the others.
        """
        for head in heads:
            if head.exclusive is not None and head.rank != Rank.INTERRUPTED:
                self._served.pop(head.task, None)
                self._served[head.task] = head.exclusive

    def in_order(self, tasks: Iterable[str]) -> list[str]:
        """These tasks, those first that were served longest ago: they may share a limit."""
        places = {task: place for place, task in enumerate(self._served)}
        return sorted(tasks, key=lambda task: places.get(task, -1))


def sizes(most: int, tasks: int) -> Iterator[int]:
    """How many queues of each task the looks read, one after the other, for `most` runs to
    start.
    """
    for queues in (min(most, MOST_QUEUES), *repeat(MOST_QUEUES, MOST_LOOKS - 1)):
        yield max(LEAST_QUEUES, queues // tasks)


class Look:
    """One look for the runs of tasks with a limit that may start at `now`."""

    def __init__(
        self,
        connection: AsyncConnection,
        limited: Iterable[Queueing],
        now: datetime,
        retries: bool,
        most: int,
        turns: Turns,
        locks: bool,
    ) -> None:
        """`retries`: whether retries are due. `most`: how many runs of each task are found at most.
        `locks`: the caller claims them in this transaction.
        """
        self._connection = connection
        self._queueings = {each.task: each for each in limited}
        have_numbers = any(
            each.limit is not None and each.limit.is_dynamic for each in self._queueings.values()
        )
        self._conditions = Conditions(now, retries, have_numbers)
        self._most = most
        self._turns = turns
        self._locks = locks
        self._room: dict[str, int] = {}
        self._lanes: dict[str, list[int]] = defaultdict(list)
        """The lanes that were given away, by queue. Tasks may share queues."""
        self._places: Counter[str] = Counter()
        """How many places of each bucket were given away."""
        self._found: dict[str, list[Head]] = {}

    async def heads(self, has_urgent: bool) -> list[Head]:
        """The runs that may start: key by key, in the order of their turns. `has_urgent`: whether
        runs wait that go before the others of their queue.
        """
        most = self._most
        self._room = await _room_of_totals(
            self._connection, self._queueings.values(), self._turns, self._locks
        )
        await self._read_rates_of_all_keys()
        self._found = {task: [] for task in self._turns.in_order(self._queueings)}
        if not self._turns.are_locked:
            # Runs that go on after their parts hold what is reached.
            reached = [task for task in self._found if not self._may_begin(task)]
            await self._give_first(Rank.JOINING, dict.fromkeys(reached, most))
        if has_urgent:
            await self._give_to_urgent()
        left = dict.fromkeys(task for task in self._found if self._is_left(task))
        await self._turns.begin(self._connection, left)
        windows = Windows(self._connection, self._turns, self._conditions)
        for size in sizes(most, len(left)) if left else ():
            for task, queues in (await windows.following(left, size, most)).items():
                before = len(self._found[task])
                await self._give(task, queues, most - before)
                if len(queues) < size:
                    del left[task]
                elif len(self._found[task]) == before and self._is_left(task):
                    self._turns.skip(task, queues[-1].name)
            left = dict.fromkeys(task for task in left if self._is_left(task))
            if not left:
                break
        in_turn = zip_longest(*self._found.values())
        return [head for each in in_turn for head in each if head is not None]

    def _may_begin(self, task: str) -> bool:
        """Whether the total of the task, and its rate over all keys, let another run begin."""
        its = self._queueings[task]
        if self._room.get(its.prefix, 1) < 1:
            return False
        bucket = its.bucket_of("") if its.has_one_bucket else None
        return bucket is None or self._places[bucket] < len(self._turns.places[bucket])

    def _is_left(self, task: str) -> bool:
        """Whether this look may find more runs of the task."""
        return len(self._found[task]) < self._most and self._may_begin(task)

    async def _read_rates_of_all_keys(self) -> None:
        self._turns.places = {}
        for its in self._queueings.values():
            if its.has_one_bucket and self._room.get(its.prefix, 1):
                await self._read_places(its, [""])

    async def _give_to_urgent(self) -> None:
        """Give up to half of the room to runs of all keys that go before the others."""
        self._turns.looks += 1
        rooms = {
            task: min(self._most, self._room.get(self._queueings[task].prefix, self._most))
            for task in self._found
        }
        halves = {task: (room + self._turns.looks % 2) // 2 for task, room in rooms.items()}
        await self._give_first(Rank.INTERRUPTED, {task: n for task, n in halves.items() if n})

    async def _give_first(self, rank: int, rooms: Mapping[str, int]) -> None:
        """Choose runs of this rank, which go before the others of their queue, in all queues.
        `rooms`: how many of each task.
        """
        if not rooms:
            return
        each = max(rooms.values())
        found = await read_queues_of_rank(
            self._connection, rank, rooms, max(each, MOST_FIRST), each, self._conditions
        )
        for task, queues in found.items():
            await self._give(task, queues, rooms[task])

    async def _give(self, task: str, queues: Sequence[Queue], room: int) -> None:
        """Choose up to `room` runs of these queues: those that get a lane, within the total, and a
        place of the rate.
        """
        its, found = self._queueings[task], self._found[task]
        chosen = {head.id for head in found}
        heads = _of_window(its, queues, self._lanes, chosen)
        if its.rate is not None:
            await self._read_places(its, [head.exclusive or "" for head in heads])
            heads = _within_rate(heads, its, self._turns, self._places, room)
        for head in _within(heads[:room], self._room, its.prefix):
            self._lanes[head.exclusive or ""].append(head.lane)
            found.append(head)

    async def _read_places(self, queueing: Queueing, queues: Iterable[str]) -> None:
        """Read the free places of the rate that these queues count for, unless this look has."""
        assert queueing.rate is not None
        turns = self._turns
        buckets = {queueing.bucket_of(queue) for queue in queues} - turns.places.keys()
        if buckets:
            numbers = dict.fromkeys(buckets, queueing.rate.number)
            found = await rates.places(self._connection, numbers, self._conditions.now, self._locks)
            turns.are_locked |= bool(found.locked)
            turns.places |= {bucket: found.free.get(bucket, []) for bucket in buckets}


class Windows:
    """The queues that one look reads, a window of each task after the other."""

    def __init__(self, connection: AsyncConnection, turns: Turns, conditions: Conditions) -> None:
        self._connection = connection
        self._turns = turns
        self._conditions = conditions
        self._after: dict[str, str] = {}

    async def following(
        self, tasks: Collection[str], size: int, most: int
    ) -> dict[str, list[Queue]]:
        """The next `size` queues of each task with their first runs: at first behind the queue that
        was served last, and from the first one on where none follows.
        """
        # Tasks that have few queues have to fill the room with the runs of those.
        number = min(self._turns.numbers.get(task, 1) for task in tasks)
        each = min(most, ceil(most / size if number >= size else 2 * most / number))
        after = {task: self._after.get(task, self._turns.after(task)) for task in tasks}
        found = await read_queues(self._connection, after, size, each, self._conditions)
        missing = {task: "" for task in tasks if len(found[task]) < size and after[task]}
        if missing:
            first = await read_queues(self._connection, missing, size, each, self._conditions)
            for task, queues in first.items():
                known = {queue.name for queue in found[task]}
                found[task] += [queue for queue in queues if queue.name not in known]
                del found[task][size:]
        for task, queues in found.items():
            self._turns.numbers[task] = max(1, len(queues))
            if queues:
                self._after[task] = queues[-1].name
        return found


def _of_window(
    queueing: Queueing,
    queues: Sequence[Queue],
    given: Mapping[str, Sequence[int]],
    chosen: Collection[str],
) -> list[Head]:
    """The runs of these queues that have a lane, the first of each queue before the second of any.
    `given`: the lanes that this look has given away. `chosen`: the ids of the runs that have got
    them.
    """
    assert queueing.limit is not None
    limit = queueing.limit
    of_queues = []
    for queue in queues:
        number = queue.number if limit.is_dynamic else None
        lanes = limit.usual if number is None else number
        taken = {*queue.taken, *given.get(queue.name, ())}
        free = free_lanes(lanes, taken, len(queue.heads))
        own = []
        for head in queue.heads:
            if head.id in chosen:
                continue
            if head.goes_on:
                own.append(head)  # it keeps its lane
            elif free:
                head.lane = free.pop(0)
                own.append(head)
        of_queues.append(own)
    rounds = zip_longest(*of_queues)
    return [head for each in rounds for head in each if head is not None]


async def _room_of_totals(
    connection: AsyncConnection, limited: Iterable[Queueing], turns: Turns, locks: bool
) -> dict[str, int]:
    """How many runs of each limit with a total may start, by the prefix of its queues.

    A unique index can't count over several keys. So whoever claims such runs on PostgreSQL locks
    the limit until the commit; what another node has locked is left for the next look. On SQLite
    there is one writer at a time.
    """
    totals = {
        each.prefix: each.limit.total
        for each in limited
        if each.limit is not None and each.limit.total is not None
    }
    names = {f"batch limit {prefix}": prefix for prefix in totals} if locks else {}
    locked = {names[name] for name in await name_locks.held_elsewhere(connection, names)}
    turns.are_locked = bool(locked)
    if not (counted := totals.keys() - locked):
        return dict.fromkeys(totals, 0)
    most = max(totals.values())
    running = await key_counts.running_of_limits(connection, counted, most)
    return {prefix: max(0, total - running.get(prefix, total)) for prefix, total in totals.items()}


def _within_rate(
    heads: Iterable[Head], queueing: Queueing, turns: Turns, given: Counter[str], most: int
) -> list[Head]:
    """The first `most` of those for which the rate has a place. `given`: how many places of each
    bucket this look has given away, which tasks may share.
    """
    chosen: list[Head] = []
    for head in heads:
        if len(chosen) == most:
            break
        if counts_for_rate(head):
            bucket = queueing.bucket_of(head.exclusive or "")
            if given[bucket] >= len(turns.places[bucket]):
                continue
            given[bucket] += 1
        chosen.append(head)
    return chosen


async def take_places(
    connection: AsyncConnection, begun: Iterable[tuple[Head, Queueing]], turns: Turns, now: datetime
) -> None:
    """Take the places of the runs that begin at `now`, which the last look has found."""
    taken = [
        (bucket, turns.places[bucket].pop(0), queueing.rate.per)
        for head, queueing in begun
        if queueing.rate is not None and counts_for_rate(head)
        for bucket in [queueing.bucket_of(head.exclusive or "")]
    ]
    await rates.take(connection, taken, now)


async def take_place(
    connection: AsyncConnection, queueing: Queueing, queue: str | None, now: datetime
) -> bool:
    """Take a place of the rate for one run of this queue, which begins at `now`, if the task has a
    rate. Returns False if none is free.
    """
    if queueing.rate is None:
        return True
    bucket = queueing.bucket_of(queue or "")
    found = await rates.places(connection, {bucket: queueing.rate.number}, now, locks=True)
    free = found.free.get(bucket)
    if not free:
        return False
    await rates.take(connection, [(bucket, free[0], queueing.rate.per)], now)
    return True


async def free_lane(connection: AsyncConnection, queueing: Queueing, queue: str) -> int | None:
    """The lane that one further run of this queue may take until the commit; None if the limit or
    its total is reached, or another node claims runs of a limit with a total at this moment.
    """
    assert queueing.limit is not None
    room = await _room_of_totals(connection, [queueing], Turns(), locks=True)
    if not room.get(queueing.prefix, 1):
        return None
    numbers = await concurrency.numbers_of(connection, queueing.limit, [queue])
    return next(iter((await concurrency.free(connection, numbers))[queue]), None)


def counts_for_rate(head: Head) -> bool:
    """Whether a new attempt begins. Runs that go on keep their attempt."""
    return not head.goes_on and head.state != RunState.INTERRUPTED


def _within(heads: Sequence[Head], room: dict[str, int], prefix: str) -> list[Head]:
    """Those for which the total has room. Runs that go on after their parts have a lane already."""
    if prefix not in room:
        return list(heads)
    chosen = []
    for head in heads:
        if not head.goes_on:
            if room[prefix] < 1:
                continue
            room[prefix] -= 1
        chosen.append(head)
    return chosen
