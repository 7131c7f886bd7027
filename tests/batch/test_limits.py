"""Limits: how many runs of a task with one value of a parameter run at once, and whose turn it
is.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from batch_system import Limit, Retry, TaskRegistry, clock
from batch_system.batch.execution.engine import LocalEngine
from batch_system.batch.execution.run_here import ManualRun
from batch_system.batch.ledger import gauges, limit_numbers, queue_rows
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.states import Rank, RunState, StartPriority
from batch_system.batch.queue import claiming, enqueue, left_queues
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.queue.requests import Startable, StartRequest, Starts
from batch_system.batch.queue.turns import Turns
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from batch_system.errors import InvalidTask, TooManyWaiting
from batch_system.operations.asking.actor import Actor
from batch_system.operations.asking.results import Node
from batch_system.operations.runs import late
from batch_system.operations.runs.blocking import blocker_in_words
from batch_system.verbs.tasks import ListKeys
from tests.asking import operations_on
from tests.batch.ledger_world import NODE, know, make_task, rows
from tests.batch.test_runs import ending, finish, insert, new


async def mail(self: Any, tenant: str = "nobody", number: int = 0) -> None: ...


def limited(limit: Limit, name: str = "mail", **attributes: Any) -> Task:
    return make_task(name, None, mail, limit=limit, **attributes)


async def queue(
    ledger: Database,
    task: Task,
    *tenants: str | None,
    priority: StartPriority | None = None,
) -> list[str]:
    """Queue a run for each of these tenants; None: the run does not give the parameter."""
    ids = []
    async with ledger.engine.begin() as connection:
        for tenant in tenants:
            params = None if tenant is None else {"tenant": tenant}
            starts = Starts((StartRequest(Startable.of(task), params, priority=priority),))
            ids.append(str(await enqueue.write(connection, starts, None)))
    return ids


async def claim(
    ledger: Database, tasks: Mapping[str, Task], most: int = 100, turns: Turns | None = None
) -> list[Claimed]:
    async with ledger.engine.begin() as connection:
        claimed, _ = await claiming.take(
            connection, tasks, NODE, Capacity(most, most), turns=turns or Turns()
        )
        return claimed


async def tenants(ledger: Database, state: str = "running") -> Counter[str]:
    found = await rows(ledger, state=state)
    return Counter(str((row["params"] or {}).get("tenant")) for row in found)


async def test_each_value_of_the_key_runs_as_often_as_the_limit_allows(ledger: Database) -> None:
    tasks = await know(ledger, limited(Limit(2, key="tenant")))
    await queue(ledger, tasks["mail"], *["acme"] * 5, *["bolt"] * 3, "core")
    first = await claim(ledger, tasks)
    assert await tenants(ledger) == {"acme": 2, "bolt": 2, "core": 1}
    assert await claim(ledger, tasks) == []
    await finish(ledger, *[ending(run) for run in first])
    await claim(ledger, tasks)
    assert await tenants(ledger) == {"acme": 2, "bolt": 1}


async def test_runs_without_the_parameter_count_with_those_that_give_its_default(
    ledger: Database,
) -> None:
    tasks = await know(ledger, limited(Limit(2, key="tenant")))
    await queue(ledger, tasks["mail"], None, "nobody", None, "nobody")
    assert len(await claim(ledger, tasks)) == 2


async def test_nobody_waits_behind_the_runs_of_a_big_key(ledger: Database) -> None:
    tasks = await know(ledger, limited(Limit(3, key="tenant")))
    await queue(ledger, tasks["mail"], *["big"] * 50, "small", "tiny")
    turns = Turns()
    begun = [await claim(ledger, tasks, 1, turns) for _ in range(4)]
    assert await tenants(ledger) == {"big": 2, "small": 1, "tiny": 1}
    await finish(ledger, *[ending(run) for each in begun for run in each])


async def test_the_next_look_begins_behind_the_key_that_was_served_last(ledger: Database) -> None:
    tasks = await know(ledger, limited(Limit(9, key="tenant")))
    for name in "abcdefgh":
        await queue(ledger, tasks["mail"], name, name)
    turns = Turns()
    for _ in range(4):
        await claim(ledger, tasks, 2, turns)
    assert await tenants(ledger) == dict.fromkeys("abcdefgh", 1)


async def test_within_a_key_a_start_of_high_priority_goes_first_and_a_low_one_last(
    ledger: Database,
) -> None:
    tasks = await know(ledger, limited(Limit(1, key="tenant")))
    order: tuple[StartPriority | None, ...] = ("low", None, "high")
    ids = {
        (await queue(ledger, tasks["mail"], "acme", priority=priority))[0]: priority
        for priority in order
    }
    begun = []
    for _ in order:
        claimed = await claim(ledger, tasks)
        begun += [ids[run.id] for run in claimed]
        await finish(ledger, *[ending(run) for run in claimed])
    assert begun == ["high", None, "low"]


async def test_a_new_process_goes_on_where_the_others_are(ledger: Database) -> None:
    tasks = await know(ledger, limited(Limit(9, key="tenant")))
    for name in "abcdefgh":
        await queue(ledger, tasks["mail"], name, name)
    for _ in range(4):
        await claim(ledger, tasks, 2, Turns())
    assert await tenants(ledger) == dict.fromkeys("abcdefgh", 1)


@pytest.mark.parametrize("most", [1, 2, 5])
async def test_runs_of_high_priority_get_half_of_what_begins_and_no_key_waits_for_ever(
    ledger: Database, most: int
) -> None:
    tasks = await know(ledger, limited(Limit(100, key="tenant")))
    others = [f"t{n:02}" for n in range(20)]
    await queue(ledger, tasks["mail"], *others)
    await queue(ledger, tasks["mail"], *["z"] * 40, priority="high")
    turns, begun = Turns(), 0
    while begun < 20:
        begun += len(await claim(ledger, tasks, most, turns))
    running = await tenants(ledger)
    assert abs(running["z"] - begun // 2) <= 2
    assert all(running[other] for other in others[: begun // 2 - 2])


async def test_keys_whose_runs_can_not_start_hide_no_other(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    from batch_system.batch.queue import turns as module

    monkeypatch.setattr(module, "MOST_QUEUES", 20)
    tasks = await know(ledger, limited(Limit(1, key="tenant")))
    blocked = [f"a{n:02}" for n in range(45)]
    await queue(ledger, tasks["mail"], *blocked)
    assert len(await claim(ledger, tasks, 20)) == 20
    await claim(ledger, tasks, 100)
    await claim(ledger, tasks, 100)
    assert await tenants(ledger) == dict.fromkeys(blocked, 1)
    await queue(ledger, tasks["mail"], *blocked, "z")
    assert len(await claim(ledger, tasks, 5)) == 1
    assert (await tenants(ledger))["z"] == 1


@pytest.mark.parametrize("total", [1, 4])
async def test_no_key_loses_its_turn_to_runs_of_high_priority_that_fill_the_total(
    ledger: Database, total: int
) -> None:
    tasks = await know(ledger, limited(Limit(1, key="tenant", total=total)))
    keys = [f"t{n:02}" for n in range(30)]
    await queue(ledger, tasks["mail"], *keys)
    await queue(ledger, tasks["mail"], *(f"u{n:02}" for n in range(60)), priority="high")
    turns, served = Turns(), list[str]()
    for _ in range(64 // total):
        begun = await claim(ledger, tasks, 20, turns)
        assert len(begun) == total
        await finish(ledger, *[ending(run) for run in begun])
        served += [(run.params or {})["tenant"] for run in begun]
    assert [tenant for tenant in served if tenant in keys] == keys


async def test_tasks_share_a_limit_by_its_name(ledger: Database) -> None:
    shared = Limit(2, name="erp")
    tasks = await know(ledger, limited(shared), limited(shared, "invoice"))
    for task in tasks.values():
        await queue(ledger, task, "a", "b", "c")
    turns = Turns()
    served = []
    for _ in range(4):
        begun = await claim(ledger, tasks, turns=turns)
        assert len(begun) == 2
        assert await claim(ledger, tasks, turns=turns) == []
        await finish(ledger, *[ending(run) for run in begun])
        served += [run.task for run in begun]
        if len(served) == 6:
            break
    assert Counter(served[:4]) == {"invoice": 2, "mail": 2}


@pytest.mark.rest
@pytest.mark.parametrize("total", [None, 9])
async def test_four_claimers_are_never_above_a_limit_and_serve_every_key(
    ledger: Database, ledger_url: str, total: int | None
) -> None:
    tasks = await know(ledger, limited(Limit(2, key="tenant", total=total)))
    names = [f"t{n}" for n in range(30)]
    await queue(ledger, tasks["mail"], *(name for name in names for _ in range(20)))
    most_at_once: Counter[str] = Counter()
    done: Counter[str] = Counter()

    most_in_all = 0

    async def claimer(number: int) -> None:
        nonlocal most_in_all
        own = Database(ledger_url, setting="LEDGER_URL", pooled=False)
        turns, apart, begun = Turns(), False, []
        while sum(done.values()) < 600:
            try:
                async with own.engine.begin() as connection:
                    claimed, _ = await claiming.take(
                        connection, tasks, NODE, Capacity(7, 7), apart, turns
                    )
            except IntegrityError:  # as the engine does
                apart = True
                continue
            apart = False
            begun += claimed
            now_running = await tenants(own)
            most_in_all = max(most_in_all, now_running.total())
            for name, running in now_running.items():
                most_at_once[name] = max(most_at_once[name], running)
            random.shuffle(begun)
            ended, begun = begun[:5], begun[5:]
            await finish(own, *[ending(run) for run in ended])
            done.update((run.params or {})["tenant"] for run in ended)

    await asyncio.gather(*(claimer(number) for number in range(4)))
    assert done == dict.fromkeys(names, 20)
    assert max(most_at_once.values()) == 2
    assert total is None or most_in_all <= total


async def test_a_retry_takes_its_turn_in_its_key(ledger: Database) -> None:
    task = limited(Limit(1, key="tenant"), retry=Retry(attempts=2))
    tasks = await know(ledger, task)
    [run, *_] = await queue(ledger, task, "acme", "acme")
    [claimed] = await claim(ledger, tasks)
    assert claimed.id == run
    later = clock.now() + timedelta(seconds=5)
    await finish(ledger, ending(claimed, RunState.RETRYING, due_at=later, reason="it failed"))
    with clock.moved(later):
        [again] = await claim(ledger, tasks)
    assert again.id != run  # it waits longer than the retry


async def test_long_and_odd_values_are_keys_too(ledger: Database) -> None:
    tasks = await know(ledger, limited(Limit(1, key="tenant")))
    odd = ["x" * 500, "x" * 501, "a]b", "\n", "é", "it's", ""]
    await queue(ledger, tasks["mail"], *odd, *odd)
    await claim(ledger, tasks)
    assert await tenants(ledger) == dict.fromkeys(odd, 1)
    assert max(len(row["exclusive"]) for row in await rows(ledger)) <= 120


async def test_runs_from_before_the_limit_and_of_another_key_go_on(ledger: Database) -> None:
    task = limited(Limit(1, key="number"))
    tasks = await know(ledger, task)
    await insert(
        ledger,
        new("mail", exclusive=None),
        new("mail", exclusive="mail"),
        new("mail", exclusive="mail[tenant=acme]"),
    )
    assert await left_queues.rejoin(ledger, tasks) == {"mail": 1}
    assert len(await claim(ledger, tasks)) == 3


async def test_runs_of_a_task_that_has_lost_its_limit_go_on(ledger: Database) -> None:
    await know(ledger, limited(Limit(1, key="tenant")))
    await queue(ledger, TaskRegistry.get("mail"), "acme", "bolt")
    TaskRegistry.clear()
    tasks = await know(ledger, make_task("mail", None, mail, overlap="allow"))
    assert await claim(ledger, tasks) == []
    while await left_queues.rejoin(ledger, tasks):
        pass
    assert len(await claim(ledger, tasks)) == 2


async def test_a_waiting_slot_of_a_task_with_a_limit_is_seen_as_late(ledger: Database) -> None:
    task = make_task("mail", "* * * * *", mail, limit=Limit(1, key="tenant"))
    await know(ledger, task)
    slot = clock.now() - timedelta(minutes=30)
    own = task.queueing.of(None)
    given = {"origin": "schedule", "slot": slot, "rank": Rank.ON_TIME, "exclusive": own}
    await insert(ledger, new("mail", **given, due_at=slot, created_at=slot))
    async with ledger.reader.connect() as connection:
        ids = text(queue_rows.first_on_time(5))
        assert len((await connection.execute(ids)).all()) == 1
        assert await gauges.oldest_waiting_since(connection) == slot


async def test_keys_are_listed_with_what_runs_and_waits(ledger: Database) -> None:
    tasks = await know(ledger, limited(Limit(2, key="tenant")))
    odd = "x" * 200
    await queue(ledger, tasks["mail"], *["acme"] * 5, "bolt", odd, odd)
    await claim(ledger, tasks)
    operations = operations_on(ledger)
    found = await operations(ListKeys(name="mail"))
    assert [(key.key, key.limit, key.running, key.waiting) for key in found.keys] == [
        (f"tenant={odd[:60]}… (200 characters)", 2, 2, 0),
        ("tenant=acme", 2, 2, 3),
        ("tenant=bolt", 2, 1, 0),
    ]
    assert found.keys[1].oldest is not None and found.after is None
    first = await operations(ListKeys(name="mail", limit=2))
    assert first.after == "mail[tenant=acme]"
    [last] = (await operations(ListKeys(name="mail", after=first.after))).keys
    assert last.key == "tenant=bolt"


async def test_a_node_with_the_file_from_before_the_limit_claims_no_run_of_a_key(
    ledger: Database,
) -> None:
    """During a rolling deployment, older nodes would not know how many runs may go on."""
    tasks = await know(ledger, limited(Limit(1, key="tenant")))
    await queue(ledger, tasks["mail"], "acme", "acme")
    TaskRegistry.clear()
    for before in ({}, {"overlap": "allow"}, {"max_running": 5}):
        older = make_task("mail", None, mail, **before)
        assert await claim(ledger, {"mail": older}) == []
        TaskRegistry.clear()
    assert len(await claim(ledger, tasks)) == 1


async def test_the_keys_of_a_task_whose_parameters_are_secret_are_hidden(ledger: Database) -> None:
    tasks = await know(ledger, limited(Limit(1, key="tenant"), tags=["secret"]))
    await queue(ledger, tasks["mail"], "acme", "bolt")
    viewer = operations_on(ledger).by(Actor("bob", "viewer", "api"))
    found = await viewer(ListKeys(name="mail", limit=1))
    assert "acme" not in found.model_dump_json() and found.after is None
    assert [(key.key, key.waiting) for key in found.keys] == [("(hidden)", 1)]


def test_a_secret_parameter_is_no_key() -> None:
    async def run(self: Any, api_token: str = "x") -> None: ...

    with pytest.raises(InvalidTask, match="'api_token', which is secret by BATCH_SECRET_WORDS"):
        make_task("mail", None, run, limit=Limit(1, key="api_token"))


async def test_a_start_beyond_the_backlog_is_refused_and_writes_nothing(ledger: Database) -> None:
    tasks = await know(ledger, limited(Limit(1, key="tenant", backlog=3)))
    await queue(ledger, tasks["mail"], "acme", "acme", "bolt")
    with pytest.raises(TooManyWaiting) as refused:
        await queue(ledger, tasks["mail"], "bolt", *["acme"] * 2)
    assert refused.value.message == "mail: 3 runs of tenant=acme wait already (backlog=3)"
    assert len(await rows(ledger)) == 3
    await claim(ledger, tasks)
    await queue(ledger, tasks["mail"], "acme", "acme", "bolt")


@pytest.mark.rest
async def test_a_run_by_hand_waits_for_the_number_of_its_key_and_for_the_total(
    ledger: Database,
) -> None:
    limit = Limit(lambda _: 9, key="tenant", default=9, total=2)
    loaded = await know(ledger, limited(limit))
    async with ledger.engine.begin() as connection:
        answers = [limit_numbers.Answer("mail[tenant=acme]", 1)]
        await limit_numbers.store(connection, "mail", answers, clock.now())
    engine = LocalEngine(ledger, loaded, NODE, pools=())
    engine.start()
    for others in (["acme"], ["bolt", "core"]):
        await queue(ledger, loaded["mail"], *others)
        running = await claim(ledger, loaded)
        by_hand = ManualRun(ledger, engine, loaded["mail"], NODE)
        waiting = asyncio.create_task(by_hand.execute({"tenant": "acme"}, None, None))
        await asyncio.sleep(0.1)
        assert await tenants(ledger) == Counter(others)
        await finish(ledger, *[ending(run) for run in running])
        assert (await waiting)["state"] == "succeeded"
    await engine.stop()


async def test_it_is_said_how_many_of_its_key_are_running(ledger: Database) -> None:
    tasks = await know(ledger, limited(Limit(2, key="tenant")))
    *_, waiting = await queue(ledger, tasks["mail"], *["acme"] * 3)
    await claim(ledger, tasks)
    made: Any = Node.model_construct
    node = made(tasks=["mail"])
    async with ledger.reader.connect() as connection:
        found = await late.waiting_of(connection, waiting, [node], clock.now())
    assert found is not None and found.blocker is not None
    assert blocker_in_words(found.blocker) == "2 of 2 of tenant=acme are running"


@pytest.mark.parametrize(
    ("limit", "attributes", "said"),
    [
        ({"number": 0}, {}, "Limit(number) is 0; allowed: an int from 1 to 1,000"),
        ({"number": 2, "key": "x y"}, {}, "Limit(key) is 'x y'; allowed: the name of a parameter"),
        ({"number": 2, "name": "A"}, {}, "Limit(name) is 'A'; allowed: 1 to 100 characters"),
        ({"number": 2, "key": "nope"}, {}, "which is no parameter of run(); allowed: tenant, num"),
        ({"number": 2}, {"max_running": 2}, "max_running is 2; allowed: None for a task with a l"),
        ({"number": 2}, {"overlap": "wait"}, "overlap is 'wait'; allowed: 'allow', which a limit"),
    ],
)
def test_a_limit_that_can_not_hold_is_refused(
    limit: dict[str, Any], attributes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidTask) as refused:
        limited(Limit(**limit), **attributes)
    assert said in str(refused.value)
