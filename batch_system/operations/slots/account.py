"""Answers the account of slots: what became of every slot of an interval."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.account import account as account_of
from batch_system.batch.account.account import Account, AccountedSlot, AccountFinding, ignore
from batch_system.batch.account.slots import Kind
from batch_system.batch.ledger import database_time
from batch_system.batch.ledger import tasks as task_rows
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import LeftOutDate
from batch_system.operations.runs.read import refuse_unknown_task
from batch_system.operations.slots.results import Accounts, SlotFinding, SlotOutcome, TaskAccount
from batch_system.operations.system import pool_problems

TEXTS = {
    Kind.DUE: "not handled yet; a service handles it when it next fires or starts",
    Kind.LATE: "not handled for more than a minute, though a running service has the task",
    Kind.GAP: "no run, no skip, no missed range",
    Kind.SURPLUS: "a scheduled run, but no schedule has the slot",
    Kind.UNREADABLE: "the slots can't be computed",
}


async def accounts(
    context: Context,
    since: datetime,
    until: datetime | None = None,
    task: str | None = None,
    on_slot: Callable[[SlotOutcome], None] | None = None,
) -> Accounts:
    """The accounts of all tasks, or of one. `on_slot` is called with each slot. Raises UnknownTask,
    DatabaseError.
    """

    def pass_on(slot: AccountedSlot) -> None:
        if on_slot is not None:
            on_slot(_outcome(slot))

    async with context.databases.reading() as connection:
        if task is not None:
            await refuse_unknown_task(connection, task)
        if connection is None:
            return _accounts([], [])
        see = ignore if on_slot is None else pass_on
        found = account_of.accounts(connection, since, until, task, context.lease_seconds, see)
        made = [account async for account in found]
        return _accounts(made, await _pools(connection, context, task))


def _outcome(slot: AccountedSlot) -> SlotOutcome:
    return SlotOutcome(**slot._asdict(), text=TEXTS.get(slot.kind))


async def _pools(connection: AsyncConnection, context: Context, task: str | None) -> list[str]:
    """Why runs of all tasks, or of one, wait in vain."""
    found = await pool_problems.problems(
        connection, context, await database_time.now_of(connection)
    )
    return [
        problem.text
        for problem in found
        if task is None or task in await task_rows.of_pool(connection, problem.pool)
    ]


def _accounts(accounts: list[Account], pools: list[str]) -> Accounts:
    total = {kind: sum(account.counts[kind] for account in accounts) for kind in Kind}
    return Accounts(
        tasks=[_task_account(account) for account in accounts],
        complete=all(account.is_complete for account in accounts),
        due=total[Kind.DUE],
        unaccounted=total[Kind.GAP] + total[Kind.LATE],
        wrong_ranges=total[Kind.RANGE],
        unreadable=total[Kind.UNREADABLE],
        pools=pools,
    )


def _task_account(account: Account) -> TaskAccount:
    counts = account.counts
    return TaskAccount(
        task=account.task,
        since=account.since,
        until=account.until,
        slots=account.slots,
        runs=counts[Kind.RUN],
        skipped=counts[Kind.SKIPPED],
        missed=counts[Kind.MISSED],
        due=counts[Kind.DUE] + counts[Kind.LATE],
        gaps=counts[Kind.GAP],
        complete=account.is_complete,
        findings=[_finding(finding) for finding in account.findings],
        left_out=[LeftOutDate.of(vars(each)) for each in account.left_out],
    )


def _finding(finding: AccountFinding) -> SlotFinding:
    return SlotFinding(
        kind=finding.kind,
        first=finding.first,
        last=finding.last,
        count=finding.count,
        text=": ".join(filter(None, [TEXTS.get(finding.kind), finding.text])),
    )
