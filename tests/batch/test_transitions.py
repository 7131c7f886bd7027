"""One door for the state of a run: ledger/transitions.py makes the changes of TRANSITIONS, and
nothing else makes any.

The second half is a rule about the code, as in tests/test_architecture.py: tried on the project,
and on made-up code that breaks it.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import runs, tables, transitions
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import ACTIVE, TRANSITIONS, RunState, before
from batch_system.batch.ledger.tables import READY_SQL, RETRYING_SQL
from batch_system.database.engine import Database
from tests.batch.ledger_world import NODE
from tests.batch.test_runs import new
from tests.test_architecture import ROOT, Module, modules_in

NOW = datetime(2026, 3, 10, 12, 0, tzinfo=UTC)

CHANGES = [
    (old, new_state) for old, following in TRANSITIONS.items() for new_state in sorted(following)
]

Door = Callable[[AsyncConnection, str], Awaitable[object]]


async def claim(connection: AsyncConnection, run: str) -> None:
    await transitions.claim(connection, [run], NODE, NOW)


async def claim_a_lane(connection: AsyncConnection, run: str) -> None:
    await transitions.claim(connection, [run], NODE, NOW, {run: 2})


async def cancel(connection: AsyncConnection, run: str) -> None:
    await transitions.cancel(connection, [run], "cancelled by ann", "ann", NOW)


async def retry(connection: AsyncConnection, run: str) -> None:
    await transitions.reopen(connection, [run], 0, "ann", NOW)


async def begin_anew(connection: AsyncConnection, run: str) -> None:
    await transitions.reopen(connection, [run], 0, "ann", NOW, anew=True)


async def fail_waiting(connection: AsyncConnection, run: str) -> None:
    for waits in (READY_SQL, RETRYING_SQL):
        ids = select(tables.runs.c.id).where(tables.runs.c.id == run)
        await transitions.fail_waiting(connection, ids, waits, "nobody has the task", NOW)


async def open_waiting(connection: AsyncConnection, run: str) -> None:
    await transitions.open_waiting(connection, [run], NOW)


async def close_waiting(connection: AsyncConnection, run: str) -> None:
    await transitions.close_waiting(
        connection, {run: "what it waited for has failed"}, NOW, gate=True
    )


async def wait_again(connection: AsyncConnection, run: str) -> None:
    await transitions.wait_again(connection, [run], NOW)


def finish(state: RunState) -> Door:
    async def finish_as(connection: AsyncConnection, run: str) -> None:
        await transitions.finish(
            connection, [Outcome(run, 1, state, state, 1, NODE, "t", NOW, NOW)]
        )

    return finish_as


async def finish_after_a_request(connection: AsyncConnection, run: str) -> None:
    await cancel(connection, run)
    await finish(RunState.RETRYING)(connection, run)


async def wait_anew(connection: AsyncConnection, run: str) -> None:
    gated = {"id": run, "gate": "success", "wait_until": None}
    await transitions.wait_anew(connection, [gated], 3, "ann", NOW)


async def join_parts(connection: AsyncConnection, run: str) -> None:
    await transitions.join_parts(connection, [run], NOW)


async def fail_split(connection: AsyncConnection, run: str) -> None:
    failing = {"id": run, "reason": "1 of 2 parts failed: 1", "fingerprint": "parts"}
    await transitions.fail_split(connection, [failing], NOW)


DOORS: list[Door] = [
    *(join_parts, fail_split),
    *(open_waiting, close_waiting, wait_again, wait_anew),
    *(claim, claim_a_lane, cancel, retry, begin_anew, fail_waiting, finish_after_a_request),
    *(finish(state) for state in sorted(TRANSITIONS[RunState.RUNNING])),
]


async def changed(ledger: Database, state: RunState, door: Door) -> RunState:
    """The state of a run that was in `state` after one of the functions was called."""
    run = new(
        state=state,
        attempt=1,
        fence=1,
        node=NODE,
        attempt_started_at=NOW,
        exclusive=None,
        gate="success",
    )
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [run])
        await door(connection, run.id)
        row = await runs.get(connection, run.id)
    assert row is not None
    return RunState(row["state"])


async def test_the_functions_make_exactly_the_allowed_transitions(ledger: Database) -> None:
    made = {(state, await changed(ledger, state, door)) for state in RunState for door in DOORS}
    assert {(old, now) for old, now in made if old != now} == set(CHANGES)


@pytest.mark.parametrize(
    ("old", "becomes"), CHANGES, ids=[f"{old}-{becomes}" for old, becomes in CHANGES]
)
async def test_a_transition_that_is_removed_from_the_table_is_not_made_any_more(
    ledger: Database, monkeypatch: pytest.MonkeyPatch, old: RunState, becomes: RunState
) -> None:
    """This shows that the statements are built from the table."""
    monkeypatch.setitem(TRANSITIONS, old, TRANSITIONS[old] - {becomes})
    for door in DOORS:
        with contextlib.suppress(ValueError):  # `finish` refuses
            assert await changed(ledger, old, door) != becomes


async def test_an_attempt_can_not_end_in_a_state_that_does_not_follow_running(
    ledger: Database,
) -> None:
    for state in set(RunState) - TRANSITIONS[RunState.RUNNING]:
        with pytest.raises(ValueError, match=f"can't become {state}"):
            await changed(ledger, RunState.RUNNING, finish(state))


def test_before_returns_the_states_from_which_a_run_may_change() -> None:
    assert before(RunState.RUNNING) == ("queued", "retrying", "interrupted")
    assert before(RunState.CANCELLED) == ACTIVE
    assert before(RunState.SKIPPED) == ("waiting",)


async def test_only_a_run_that_was_closed_by_what_it_waited_for_waits_again(
    ledger: Database,
) -> None:
    """A run that its overlap policy has skipped has no gate, and neither has one that a person has
    retried.
    """
    closed = {"state": RunState.WAITING, "exclusive": None, "gate": "success"}
    by_what_it_waited_for, by_overlap = new(**closed), new(**closed)
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [by_what_it_waited_for, by_overlap])
        await transitions.close_waiting(
            connection, {by_what_it_waited_for.id: "a has failed"}, NOW, gate=True
        )
        await transitions.close_waiting(
            connection, {by_overlap.id: "another runs"}, NOW, gate=False
        )
        await transitions.wait_again(connection, [by_what_it_waited_for.id, by_overlap.id], NOW)
        states = {
            run.id: (await runs.get(connection, run.id))
            for run in (by_what_it_waited_for, by_overlap)
        }
    assert {run: row and row["state"] for run, row in states.items()} == {
        by_what_it_waited_for.id: "waiting",
        by_overlap.id: "skipped",
    }


async def test_a_run_that_waits_again_waits_as_long_as_before(ledger: Database) -> None:
    hours, later = timedelta(hours=2), NOW + timedelta(days=3)
    run = new(state=RunState.WAITING, exclusive=None, gate="success", wait_until=NOW + hours)
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [run])
        await transitions.close_waiting(connection, {run.id: "a has failed"}, NOW, gate=True)
        await transitions.wait_again(connection, [run.id], later)
        row = await runs.get(connection, run.id)
    assert row is not None
    assert (row["due_at"], row["wait_until"], row["reason"], row["finished_at"]) == (
        later,
        later + hours,
        None,
        None,
    )


# New runs.


def test_the_run_of_a_slot_is_queued_and_ranked_last_if_its_slot_was_missed() -> None:
    on_time, late = (
        NewRun.scheduled("t", NOW, NOW, catch_up=catch_up, exclusive="t", priority=3)
        for catch_up in (False, True)
    )
    assert (on_time.state, on_time.origin, on_time.rank, on_time.catch_up) == (
        "queued",
        "schedule",
        1,
        False,
    )
    assert (late.state, late.origin, late.rank, late.catch_up) == ("queued", "schedule", 3, True)
    assert (on_time.slot, on_time.due_at, on_time.created_at) == (NOW, NOW, NOW)
    assert (on_time.exclusive, on_time.priority, on_time.fence) == ("t", 3, 0)


def test_a_started_run_is_queued_and_ranked_last_if_it_is_a_backfill() -> None:
    asked = {
        "exclusive": None,
        "priority": 0,
        "params": {"a": 1},
        "requested_by": "ann",
        "key": "k",
        "parent": "p",
    }
    run, fills = (
        NewRun.queued("t", None, NOW, is_backfill=fills, **asked) for fills in (False, True)
    )
    assert (run.state, run.origin, run.rank, run.catch_up) == ("queued", "manual", 2, False)
    assert (fills.state, fills.origin, fills.rank, fills.catch_up) == (
        "queued",
        "backfill",
        3,
        True,
    )
    assert {name: getattr(run, name) for name in asked} == asked


def test_a_run_that_a_node_starts_at_once_has_attempt_one_and_fence_one() -> None:
    run = NewRun.running(NODE, "t", None, NOW, exclusive=None, priority=0)
    assert (run.state, run.node, run.fence, run.attempt) == ("running", NODE, 1, 1)
    assert run.started_at == run.attempt_started_at == NOW
    assert runs.claimed_from(run).fence == 1


# The rule: no other code sets a state.

DOOR = "batch_system.batch.ledger.transitions"
FACTORY = "batch_system.batch.ledger.runs"
PARTS = "batch_system.batch.ledger.parts"
"""It inserts the parts of a run, queued, with what they have in common with it."""

SETS_STATE = re.compile(
    r"\bSET\b(?:(?!\b(?:FROM|WHERE|RETURNING)\b).)*?(?<![\w.])[\"`]?state[\"`]?\s*=",
    re.IGNORECASE | re.DOTALL,
)
NEW_ROW = re.compile(r"\bINSERT\s+(?:OR\s+\w+\s+)?INTO\s+[\"`]?batch_runs\b", re.IGNORECASE)


def text_of(node: ast.expr) -> str:
    """A literal string, with an ellipsis in place of each part that is computed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mod):
        return text_of(node.left) + text_of(node.right)
    return "…"


def names_of_the_table(module: Module) -> set[str]:
    """The names under which a module uses the table of runs."""
    imported = (node for node in ast.walk(module.tree) if isinstance(node, ast.ImportFrom))
    aliases = {
        alias.asname or alias.name
        for node in imported
        if (node.module or "").endswith("ledger.tables")
        for alias in node.names
        if alias.name == "runs"
    }
    return aliases | {"tables.runs"}


def writes_of_states(module: Module) -> Iterator[tuple[int, str]]:
    table, is_factory = names_of_the_table(module), module.name == FACTORY
    for node in ast.walk(module.tree):
        if isinstance(node, ast.expr) and SETS_STATE.search(text_of(node)):
            yield node.lineno, "SQL that sets a state"
        elif isinstance(node, ast.expr) and NEW_ROW.search(text_of(node)) and module.name != PARTS:
            yield node.lineno, "SQL that inserts a run"
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in calls_that_write(node, table, is_factory))
        elif isinstance(node, ast.Assign | ast.AnnAssign) and not is_factory:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            assigned = {ast.unparse(part) for target in targets for part in _parts(target)} - {
                "self.state"
            }
            if module.name.startswith("batch_system.batch.") and any(
                name.endswith(".state") for name in assigned
            ):
                yield node.lineno, "sets the attribute `state` of another object"


def _parts(target: ast.expr) -> list[ast.expr]:
    return (
        [part for each in target.elts for part in _parts(each)]
        if isinstance(target, ast.Tuple)
        else [target]
    )


def calls_that_write(call: ast.Call, table: set[str], is_factory: bool) -> Iterator[str]:
    function = ast.unparse(call.func)
    owner, _, name = function.rpartition(".")
    of_the_table = owner in table or any(ast.unparse(argument) in table for argument in call.args)
    if (
        name in ("update", "insert", "merge")
        and of_the_table
        and not (is_factory and name == "insert")
    ):
        yield f"{name} of the table of the runs"
    if name == "values" and (
        any(keyword.arg == "state" for keyword in call.keywords)
        or any(isinstance(part, ast.Constant) and part.value == "state" for part in _keys(call))
    ):
        yield "values with a state"
    if name == "NewRun" and not is_factory:
        yield "a run that is not from the factory"


def _keys(call: ast.Call) -> Iterator[ast.AST]:
    given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg is None)]
    dicts = (part for value in given for part in ast.walk(value) if isinstance(part, ast.Dict))
    return (key for each in dicts for key in each.keys if key is not None)


def other_doors(modules: list[Module]) -> list[str]:
    return [
        f"{module.name}:{line} {what}"
        for module in modules
        if module.name != DOOR
        for line, what in sorted(set(writes_of_states(module)))
    ]


def test_no_other_module_sets_the_state_of_a_run() -> None:
    """The demonstration alone writes runs that have ended, because they are made up."""
    modules = [*modules_in(ROOT / "batch_system"), *modules_in(ROOT / "tasks")]
    modules = [each for each in modules if not re.search(r"\.migrations\.|\.demo\.", each.name)]
    assert other_doors(modules) == []


def test_the_check_finds_every_statement_of_transitions_py() -> None:
    (door,) = [
        module for module in modules_in(ROOT / "batch_system/batch/ledger") if module.name == DOOR
    ]
    functions = [node for node in door.tree.body if isinstance(node, ast.AsyncFunctionDef)]
    lines = [line for line, _ in writes_of_states(door)]
    seen = [
        f.name for f in functions if any(f.lineno <= line <= (f.end_lineno or 0) for line in lines)
    ]
    assert seen == ["claim", "finish", "cancel", "reopen", "wait_anew", "_change", "fail_waiting"]


TABLE = "from batch_system.batch.ledger.tables import runs"


@pytest.mark.parametrize(
    "code",
    [
        "text(\"UPDATE batch_runs SET state = 'running' WHERE id = :id\")",
        "text(f\"UPDATE batch_runs SET node = {node}, state='running'\")",
        'text(f"UPDATE {table} SET node = :node, " + f"state = \'{state}\' WHERE id = :id")',
        "text('update batch_runs\\nset\\n  reason = null,\\n  \"state\" = :state')",
        "text('INSERT INTO batch_runs (id) VALUES (:id) ON CONFLICT (id) DO UPDATE "
        "SET state = excluded.state')",
        "text('INSERT INTO batch_runs (id, state) VALUES (:id, :state)')",
        f"{TABLE}\nupdate(runs).values(values)",
        f"{TABLE} as table\nupdate(table).where(table.c.id == run).values(state='running')",
        "from batch_system.batch.ledger import tables\ntables.runs.update().values(values)",
        "from batch_system.batch.ledger import tables\nsqlalchemy.update(tables.runs)",
        f"{TABLE}\ninsert(runs)",
        "statement.values(state='running')",
        "statement.values({'state': 'running', 'reason': None})",
        "statement.values(**{'state': 'running'})",
        "NewRun(new_id(), 'a')",
        "runs.NewRun(new_id(), 'a')",
        "run.state = RunState.RUNNING",
        "run.state, run.reason = RunState.SKIPPED, reason",
    ],
)
def test_the_check_finds_code_that_sets_a_state_elsewhere(code: str) -> None:
    assert other_doors([Module("batch_system.batch.queue.claiming", code)])


@pytest.mark.parametrize(
    "code",
    [
        "text(\"UPDATE batch_runs SET message = v.message FROM x WHERE state = 'running'\")",
        "text(\"SELECT id FROM batch_runs WHERE state = 'running'\")",
        'text(f"UPDATE batch_runs SET {PROGRESS}, rate = v.rate '
        "WHERE batch_runs.state = 'running'\")",
        f"{TABLE}\nselect(runs).where(runs.c.state == state)",
        "update(tables.nodes).values(stopped_at=now)",
        "replace(outcome, state=RunState.FAILED)",
        "NewRun.scheduled('a', slot, now)",
        "state = run.state",
        "self.state = AttemptState.of(run, task, 1)",
        "self.state.fence, run.state.is_fenced = 1, True",
        "'''Sets of runs by their state = what they do.'''",
    ],
)
def test_the_check_allows_code_that_only_reads_a_state(code: str) -> None:
    assert other_doors([Module("batch_system.batch.queue.claiming", code)]) == []


def test_the_check_allows_transitions_py_to_set_states() -> None:
    assert other_doors([Module(DOOR, "text(\"UPDATE batch_runs SET state = 'running'\")")]) == []
