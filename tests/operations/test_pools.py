"""What ListPools and the checks of pools report."""

from __future__ import annotations

from datetime import timedelta

from batch_system import clock
from batch_system.batch.lint.lint import findings
from batch_system.config import Settings
from batch_system.database.engine import Database
from batch_system.operations.asking.context import Loaded
from batch_system.operations.operations import Operations
from batch_system.operations.system import nodes
from batch_system.operations.system.gauges import _pools
from batch_system.settings.pools import Pool
from batch_system.verbs.night import ShowStatus
from batch_system.verbs.system import ListPools
from tests.batch.ledger_world import know, make_task
from tests.batch.test_runs import insert, new
from tests.incidents.test_pools import join


def operations(ledger: Database) -> Operations:
    return Operations(ledger, ledger, Loaded, Settings(), are_ready=True)


async def test_a_pool_says_its_nodes_its_runs_and_what_is_wrong(ledger: Database) -> None:
    await know(
        ledger,
        make_task("risk", None, pool="gpu"),
        make_task("usual", None),
        make_task("a", None, pool="cpu"),
    )
    await insert(ledger, new("risk"), new("usual"), new("usual", state="running"))
    node = await join(ledger, "gpu", "risk", capacity=8)
    default, cpu, gpu = (await operations(ledger)(ListPools())).pools
    assert (default.name, default.served_by, default.running, default.waiting) == (
        "default",
        "services",
        1,
        1,
    )
    assert (cpu.name, cpu.served_by, cpu.nodes, cpu.missing) == ("cpu", None, [], ["a"])
    assert cpu.problem is not None and cpu.problem.startswith(
        "no node serves pool cpu, which has the task a; start"
    )
    assert (gpu.nodes, gpu.places, gpu.waiting, gpu.tasks, gpu.problem) == (
        [node],
        8,
        1,
        ["risk"],
        None,
    )
    around = await nodes.around(operations(ledger).context)
    assert [problem.pool for problem in around.pool_problems] == ["cpu"]
    assert [each.name for each in (await operations(ledger)(ShowStatus())).pools] == [
        "default",
        "cpu",
        "gpu",
    ]


async def test_a_pool_of_children_has_as_many_places_as_its_setting_says(ledger: Database) -> None:
    await know(ledger, make_task("risk", None, pool="gpu"))
    for _ in range(2):
        await join(ledger, "gpu", "risk", capacity=100)
    settings = Settings(BATCH_POOL_GPU="process:2")
    (_, gpu) = (
        await Operations(ledger, ledger, Loaded, settings, are_ready=True)(ListPools())
    ).pools
    assert (gpu.served_by, gpu.places) == ("process:2", 4)
    now = clock.now()
    async with ledger.reader.connect() as connection:
        gauges = await _pools(
            connection, now - timedelta(seconds=10), now, {"gpu": Pool("process", 2)}
        )
    assert gauges["gpu"].places == 4


async def test_the_gauges_of_a_pool_count_what_runs_and_what_may_start(ledger: Database) -> None:
    await know(ledger, make_task("risk", None, pool="gpu"))
    await insert(ledger, new("risk"), new("risk", state="running"), new("risk", state="retrying"))
    await join(ledger, "gpu", "risk", capacity=8)
    async with ledger.reader.connect() as connection:
        gauges = await _pools(
            connection, clock.now() - clock.now().resolution * 10_000_000, clock.now()
        )
    assert gauges["gpu"] == (3, 1, 8)


def test_lint_warns_of_a_pool_that_nobody_serves_and_notes_a_bound_that_nothing_keeps() -> None:
    def rules(served: list[str] | None, **attributes: str) -> list[tuple[str, str]]:
        task = make_task("risk", None, **attributes)
        found = findings(task, clock.now(), served)
        return [(each.severity, each.rule) for each in found]

    assert rules([], pool="gpu") == [("warning", "unserved-pool")]
    assert rules(["gpu"], pool="gpu") == rules(None, pool="gpu") == rules([]) == []
    assert rules([], memory="1 GiB") == [("note", "memory-without-process")]
    assert rules(["gpu"], pool="gpu", memory="1 GiB") == []
