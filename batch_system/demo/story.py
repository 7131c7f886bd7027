"""The night of the story: what failed, what was late, what did not run, and what people did."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import partial

from batch_system import clock
from batch_system.batch.cron.cron import schedule
from batch_system.batch.firing.overlap import Overlap
from batch_system.batch.ledger import attempts, missed_ranges, run_logs, runs, schedules
from batch_system.batch.ledger.missed_ranges import Cause, MissedRange
from batch_system.batch.ledger.run_logs import Block
from batch_system.batch.ledger.runs import Active, Claimed
from batch_system.batch.ledger.states import Origin, Rank
from batch_system.demo import acts
from batch_system.demo.acts import SECOND, ByHand, Told
from batch_system.demo.cast import NO_VAT_ID, REFUSED, UNAUTHORIZED, WAIT_FOR_FILE
from batch_system.demo.failing import failure_of
from batch_system.demo.ordinary import Maker
from batch_system.demo.services import handled
from batch_system.demo.times import DOWNS, NOW, SHORTLY, at
from batch_system.demo.writing import Stage, info
from batch_system.verbs.incidents import AcknowledgeIncident, ListIncidents
from batch_system.verbs.tasks import PauseTask

PAUSED, PAUSED_AT = "cleanup_uploads", at("10-24 16:12:20")
DISK_FULL = "OSError(28, 'No space left on device', '/var/out/statement_v4/40612.pdf')"
SHOP = 'httpx.ReadTimeout("shop API")'
SEARCH = 'httpx.ConnectError("search-1:9200 refused")'
MAIL = 'smtplib.SMTPServerDisconnected("Connection unexpectedly closed")'
MAIL_NOTE = "Mail provider was down until 06:15, readers get it tomorrow"

BANK_FIRST, BANK_LAST = at("10-24 21:00"), at("10-25 06:30")
EXPORT, THUMBNAILS, FEED = at("10-25 03:00"), at("10-25 04:00"), at("10-25 06:00")
CATALOG, STATEMENTS, REINDEX = at("10-25 06:40"), at("10-25 00:30"), at("10-24 16:00")
DONE, TOTAL, RATE = 6_102_400, 8_200_000, 460.0
"""The progress of the export at the end: it goes on for 76 minutes."""
SKIPPED = [THUMBNAILS + number * timedelta(minutes=10) for number in range(1, 5)]

# The slot of the run of orders_import, the seconds until the invoice, how long that takes, the
# order, if it fails.
INVOICES: Sequence[tuple[datetime, float, float, int, bool]] = (
    (at("10-24 20:45"), 100, 71, 98_114, False),
    (at("10-24 22:45"), 90, 84, 98_377, False),
    (at("10-25 03:30"), 110, 77, 98_960, False),
    (at("10-25 04:45"), 95, 95, 99_182, True),
    (at("10-25 05:00"), 105, 80, 99_185, False),
    (at("10-25 05:30"), 100, 82.1, 99_187, True),
    (at("10-25 06:00"), 95, 76, 99_240, False),
)


def told(taken: Maker) -> list[Told]:
    """The slots of the night whose runs failed. `taken`: its random numbers are how long those of
    the bank took.
    """
    bank = [
        slot
        for slot in schedule("*/15 * * * *").between(BANK_FIRST - SECOND, BANK_LAST)
        if not _is_down(slot)
    ]
    seconds = {slot: round(taken.random.uniform(38, 76), 3) for slot in bank}
    seconds |= {BANK_FIRST: 51.3, BANK_LAST: 72.028}
    done = {
        "count": 40_600,
        "total": 48_112,
        "count_before": 0,
        "progress_at": at("10-25 02:04:11"),
    }
    rolled_back = "chunk 813 rolled back; 40,600 items stay committed, a retry goes on from there"
    timeout = "GET https://shop.acme.example/orders: no answer within 60 s"
    return [
        *(Told("bank_statements", slot, UNAUTHORIZED, seconds[slot], REFUSED) for slot in bank),
        Told("nightly_statements", STATEMENTS, DISK_FULL, 5_659.4, rolled_back, more=done),
        Told(
            "search_reindex",
            REINDEX,
            SEARCH,
            3_130,
            "the cluster is red",
            "mara",
            timedelta(seconds=710),
            2_826,
        ),
        Told("email_digest", at("10-25 05:00"), MAIL, 552, "11,200 of 18,400 readers have it"),
        *(
            Told("orders_import", at(f"10-24 {slot}"), SHOP, 97, timeout, again=165)
            for slot in ("19:15", "19:30")
        ),
    ]


def _is_down(slot: datetime) -> bool:
    return any(down.has(slot) for down in DOWNS)


def is_told(failed: Sequence[Told], task: str, slot: datetime) -> bool:
    """Whether a slot has no ordinary run."""
    if task == PAUSED and slot > PAUSED_AT:
        return True
    others = {
        "warehouse_export": (EXPORT, FEED),
        "thumbnails": (THUMBNAILS, *SKIPPED),
        "partner_feed": (FEED,),
    }
    if slot in (*others.get(task, ()), *((CATALOG,) if task == "catalog_sync" else ())):
        return True
    return any(each.task == task and each.slot == slot for each in failed)


def plan(stage: Stage, failed: Sequence[Told], invoices: Maker) -> None:
    """Let the night happen."""
    for each in failed:
        acts.plan(stage, each)
    orders = [each for each in failed if each.task == "orders_import" and each.by is None]
    stage.add(at("10-24 19:52:10"), partial(acts.retry_both, stage, orders, "jonas"))
    stage.add(PAUSED_AT, partial(_pause, stage))
    for slot in schedule("*/30 * * * *").between(PAUSED_AT, NOW):
        stage.add(slot + SHORTLY / 8, partial(_miss, stage, slot), looks=False)
    stage.add(at("10-25 05:21:08"), partial(_acknowledge, stage, "email_digest"))
    acts.plan_by_hand(
        stage, ByHand("report_render", at("10-25 04:14:10"), "jonas", 497, "wrong template")
    )
    acts.plan_by_hand(stage, ByHand("stock_levels", at("10-25 05:40:12"), "jonas", 178))
    for invoice in INVOICES:
        _plan_invoice(stage, invoices, *invoice)
    stage.add(THUMBNAILS + SHORTLY, partial(_thumbnails, stage), looks=False)
    stage.add(EXPORT + SHORTLY / 4, partial(_export, stage), looks=False)
    stage.add(FEED + SHORTLY / 4, partial(_wait, stage), looks=False)
    stage.add(FEED + SECOND / 2, partial(_feed, stage, None), looks=False)
    stage.add(CATALOG + SHORTLY, partial(_catalog, stage))


async def _pause(stage: Stage) -> None:
    async with stage.ledger.engine.begin() as connection:
        await handled(connection, [PAUSED])
    await stage.by("mara")(PauseTask(name=PAUSED, note="disk is being swapped, INC-311"))


async def _miss(stage: Stage, slot: datetime) -> None:
    """A slot of the paused task does not run."""
    async with stage.ledger.engine.begin() as connection:
        row = (await schedules.open_schedules(connection))[PAUSED]
        missed = MissedRange(slot, slot, 1, "paused by mara", Cause.PAUSED)
        await missed_ranges.record(connection, [(row, missed)], clock.now())
        await handled(connection, [PAUSED])


async def _acknowledge(stage: Stage, task: str) -> None:
    jonas = stage.by("jonas")
    (incident,) = (await jonas(ListIncidents(task=task))).incidents
    await jonas(AcknowledgeIncident(incident=incident.id, note=MAIL_NOTE))


def _plan_invoice(
    stage: Stage,
    maker: Maker,
    slot: datetime,
    after: float,
    seconds: float,
    order: int,
    fails: bool,
) -> None:
    """A run of orders_import starts one of invoice_pdf."""
    parent = next(
        m.run for m in stage.made if (m.run["task"], m.run["slot"]) == ("orders_import", slot)
    )
    created = slot + timedelta(seconds=after)
    asked = {
        "params": {"order": order},
        "requested_by": "task orders_import",
        "parent": parent["id"],
    }
    if fails:
        stage.add(
            created + timedelta(seconds=seconds), partial(_fail_invoice, stage, created, asked)
        )
    else:
        stage.made.append(maker.run(created, longest=seconds, **asked, rank=Rank.MANUAL))


async def _fail_invoice(stage: Stage, created: datetime, asked: dict[str, object]) -> None:
    node, order = stage.node_at(created), dict(asked["params"])["order"]  # type: ignore[call-overload]
    claimed = await stage.begin(
        stage.new("invoice_pdf", None, created, **asked), node, created + SHORTLY
    )
    line = f"order {order}: customer without vat_id, rendered nothing"
    lines = [info("invoice_pdf", clock.now() - SECOND / 50, line, "error")]
    await stage.end(claimed, node, failure_of("invoice_pdf", NO_VAT_ID), lines=lines)


async def _thumbnails(stage: Stage) -> None:
    """A run takes so long that the next four slots are skipped."""
    node, task = stage.node_at(clock.now()), stage.tasks["thumbnails"]
    claimed = await stage.begin(stage.new("thumbnails", THUMBNAILS, THUMBNAILS + SHORTLY / 2), node)
    running = Active(claimed.id, task.name, THUMBNAILS, "running", Origin.SCHEDULE, False, 1, 1)

    async def skip(slot: datetime) -> None:
        run = stage.new(task.name, slot, clock.now())
        assert not Overlap(task, [running]).admit(run, clock.now())
        async with stage.ledger.engine.begin() as connection:
            await runs.insert(connection, [run])

    for slot in SKIPPED:
        stage.add(slot + SHORTLY / 4, partial(skip, slot))
    stage.add(
        THUMBNAILS + timedelta(minutes=48, seconds=12), partial(acts.succeed, stage, claimed, node)
    )


async def _export(stage: Stage) -> None:
    """The export of 04:00 starts a minute late, and still goes on at the end."""
    run = stage.new("warehouse_export", EXPORT, clock.now())
    async with stage.ledger.engine.begin() as connection:
        await runs.insert(connection, [run])

    async def claim() -> None:
        claimed = await stage.claim(run.id, stage.node_at(clock.now()))
        lines = [
            ("03:01:00.4", "begins"),
            ("03:01:02.1", "EXPORT_PARALLEL is 2"),
            ("03:01:09.8", "first file sent"),
        ]
        log = [info(claimed.task, at(f"10-25 {when}"), text) for when, text in lines]
        stage.add(NOW - SECOND, partial(_progress, stage, claimed, DONE, TOTAL, RATE), looks=False)
        async with stage.ledger.engine.begin() as connection:
            await run_logs.write(
                connection, run_logs.pack([Block(claimed.id, claimed.fence, 1, 0, log)])
            )

    stage.add(EXPORT + timedelta(minutes=1), claim, looks=False)


async def _progress(stage: Stage, claimed: Claimed, done: int, total: int, rate: float) -> None:
    progress = {
        "count": done,
        "total": total,
        "count_before": 0,
        "message": None,
        "progress_at": clock.now(),
    }
    async with stage.ledger.engine.begin() as connection:
        row = {"id": claimed.id, "fence": claimed.fence, "rate": rate, **progress}
        await attempts.write_progress(connection, [row])


async def _wait(stage: Stage) -> None:
    """The export of 07:00 waits for that of 04:00."""
    async with stage.ledger.engine.begin() as connection:
        await runs.insert(connection, [stage.new("warehouse_export", FEED, clock.now())])


async def _feed(stage: Stage, run: str | None) -> None:
    """Two attempts do not find the file; the third one is due four minutes after the end."""
    node = stage.node_at(clock.now(), "node-b")
    if run is None:
        claimed = await stage.begin(stage.new("partner_feed", FEED, clock.now()), node)
        end = FEED + timedelta(minutes=2)
        stage.add(
            end + timedelta(minutes=20) + SHORTLY, partial(_feed, stage, claimed.id), looks=False
        )
    else:
        claimed = await stage.claim(run, node)
        end = FEED + timedelta(minutes=26)
    failure = failure_of("partner_feed", WAIT_FOR_FILE)
    stage.add(end, partial(stage.end, claimed, node, failure, wait=1_200.0), looks=False)


async def _catalog(stage: Stage) -> None:
    """A run that takes no longer than usual goes on at the end."""
    node = stage.node_at(clock.now(), "node-b")
    claimed = await stage.begin(stage.new("catalog_sync", CATALOG, clock.now()), node)
    stage.add(NOW - SECOND, partial(_progress, stage, claimed, 5_236, 31_000, 44.0), looks=False)
