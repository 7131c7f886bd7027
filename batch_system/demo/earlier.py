"""What happened before the night: some failures that were made good, and a pause."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import partial

from batch_system.batch.ledger.states import Rank
from batch_system.demo import acts
from batch_system.demo.acts import ByHand, Told
from batch_system.demo.ordinary import Maker
from batch_system.demo.services import handled
from batch_system.demo.story import DISK_FULL, MAIL, SEARCH, SHOP
from batch_system.demo.times import EVENING, at
from batch_system.demo.writing import Stage
from batch_system.verbs.tasks import PauseTask, ResumeTask

PAUSED, PAUSED_AT, RESUMED_AT = "ads_spend", at("10-21 10:02"), at("10-21 12:10")
NO_EAN = "KeyError('ean')"
SLOW_BANK = (
    'httpx.HTTPStatusError("503 Service Unavailable for url '
    'https://api.giro.example/v2/statements", '
    'request=httpx.Request("GET", "https://api.giro.example"), response=httpx.Response(503))'
)

FAILED: Sequence[Told] = (
    Told(
        "gl_posting", at("08-31 21:30"), "ValueError('period 2026-08 is closed')", 640, None, "lena"
    ),
    Told(
        "nightly_statements",
        at("09-12 00:30"),
        DISK_FULL,
        5_300,
        None,
        "jonas",
        timedelta(hours=5),
        1_900,
    ),
    Told(
        "warehouse_export",
        at("09-21 09:00"),
        "ConnectionResetError('sftp.acme.example')",
        2_100,
        None,
        "mara",
    ),
    Told(
        "nightly_statements",
        at("10-03 00:30"),
        DISK_FULL,
        5_480,
        None,
        "mara",
        timedelta(hours=4),
        1_500,
    ),
    Told("orders_import", at("10-12 08:15"), SHOP, 92, None, "jonas", timedelta(minutes=20), 190),
    Told("currency_rates", at("10-13 21:00"), 'httpx.ConnectTimeout("rates.ecb.example")', 10.1),
    Told(
        "price_check",
        at("10-13 21:35"),
        "json.JSONDecodeError('Expecting value', '<html>', 0)",
        4.2,
    ),
    Told("catalog_sync", at("10-14 09:40"), NO_EAN, 311),
    Told(
        "search_reindex",
        at("10-15 12:00"),
        SEARCH,
        1_204,
        None,
        "mara",
        timedelta(minutes=31),
        2_760,
    ),
    Told("sla_report", at("10-16 07:00"), "TimeoutError('timed out after 600 s')", 600),
    Told("fraud_scores", at("10-19 10:30"), "ConnectionRefusedError('model-2:8500')", 3.4),
    Told("email_digest", at("10-20 04:00"), MAIL, 204, None, "jonas", timedelta(minutes=52), 540),
    Told("bank_statements", at("10-20 12:15"), SLOW_BANK, 61),
    Told("catalog_sync", at("10-21 14:40"), NO_EAN, 287),
    Told(
        "exchange_feed",
        at("10-22 09:00"),
        "PermissionError('the key of the marketplace has expired')",
        2.2,
    ),
    Told("orders_import", at("10-23 15:45"), SHOP, 95, None, "mara", timedelta(minutes=17), 188),
)
BY_HAND: Sequence[ByHand] = (
    ByHand("report_render", at("10-12 13:04:20"), "lena", 402),
    ByHand("report_render", at("10-14 08:31:05"), "jonas", 377),
    ByHand("report_render", at("10-16 14:20:44"), "lena", 451),
    ByHand("report_render", at("10-20 09:12:31"), "lena", 390),
    ByHand("report_render", at("10-22 12:47:09"), "jonas", 120, "wrong customer"),
    ByHand("report_render", at("10-22 12:51:40"), "jonas", 433),
)
SHARE = 0.07
"""So many runs of orders_import start an invoice."""


def is_told(task: str, slot: datetime) -> bool:
    """Whether a slot has no ordinary run."""
    return task == PAUSED and PAUSED_AT < slot <= RESUMED_AT


def plan(stage: Stage) -> None:
    """Let the time before the night happen."""
    for told in FAILED:
        acts.plan(stage, told)
    for run in BY_HAND:
        acts.plan_by_hand(stage, run)
    stage.add(PAUSED_AT, partial(_pause, stage))
    stage.add(RESUMED_AT, partial(_resume, stage))


def make_invoices(stage: Stage, maker: Maker) -> None:
    """Let some runs of orders_import start an invoice."""
    number = 91_000
    for parent in [made.run for made in stage.made if made.run["task"] == "orders_import"]:
        number += maker.random.randint(2, 9)
        if parent["created_at"] >= EVENING or maker.random.random() > SHARE:
            continue
        asked = {
            "params": {"order": number},
            "requested_by": "task orders_import",
            "parent": parent["id"],
        }
        created = parent["started_at"] + timedelta(seconds=maker.random.uniform(20, 90))
        stage.made.append(maker.run(created, **asked, rank=Rank.MANUAL))


async def _pause(stage: Stage) -> None:
    async with stage.ledger.engine.begin() as connection:
        await handled(connection, [PAUSED])
    await stage.by("lena")(PauseTask(name=PAUSED, note="the campaigns are renamed"))


async def _resume(stage: Stage) -> None:
    await stage.by("lena")(ResumeTask(name=PAUSED))
