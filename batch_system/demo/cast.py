"""The tasks of the story: what each is called, when it runs, whose it is, and how long its runs
take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BERLIN, KATHMANDU = "Europe/Berlin", "Asia/Kathmandu"
WIKI = "https://wiki.acme.example"
GIRO = "https://api.giro.example/v2/statements"
REFUSED = 'token rejected: audience "statements-v1" is not allowed'
NO_FILE = "the partner has not put the file there yet"

UNAUTHORIZED = (
    f'httpx.HTTPStatusError("401 Unauthorized for url {GIRO}", '
    f'request=httpx.Request("GET", "{GIRO}"), response=httpx.Response(401))'
)
WAIT_FOR_FILE = f'RetryAfter(1200, "{NO_FILE}")'
NO_VAT_ID = "jinja2.UndefinedError(\"'vat_id' is undefined in template invoice.html, line 41\")"


@dataclass(frozen=True)
class Part:
    """A task of the story. Runs take about `usual` seconds; `spread` says how much that varies.

    `items`: how many items a run has. `says`: what it logs. `attributes`: further ones of its
    class, with their values as Python. `is_old`: it runs since the begin of the ledger. `flaky`: an
    error of first attempts, and how often they have it. `raises`: the error of its runs since the
    deploy; it has a condition if it is not that of all runs. `complains`: what it logs before, as
    Python.
    """

    name: str
    description: str
    cron: str | None
    usual: float
    zone: str = "UTC"
    spread: float = 0.18
    items: int = 0
    says: str = "done"
    owner: str | None = None
    runbook: str | None = None
    attributes: tuple[tuple[str, str], ...] = ()
    parameter: str = ""
    is_old: bool = False
    flaky: tuple[str, float] | None = None
    raises: str | None = None
    condition: str = ""
    complains: str | None = None

    @property
    def class_name(self) -> str:
        return "".join(word.title() for word in self.name.split("_")) + "Task"


_SKIP = ("missed", '"skip"')
_TOLD = (
    Part(
        *("bank_statements", "Fetch the statements of the banks", "*/15 * * * *", 130, BERLIN),
        items=240,
        says="fetched statements",
        owner="payments #payments-oncall",
        runbook=f"{WIKI}/bank-tokens",
        attributes=(_SKIP,),
        raises=UNAUTHORIZED,
        complains=repr(REFUSED),
    ),
    Part(
        *(
            "nightly_statements",
            "Render the statements of all customers",
            "30 2 * * *",
            6_720,
            BERLIN,
            0.06,
        ),
        items=48_112,
        says="rendered statements",
        owner="finance #finance-data",
        runbook=f"{WIKI}/renderer-disk",
        attributes=(("deadline", '"12:00"'),),
        is_old=True,
    ),
    Part(
        *("invoice_pdf", "Render the invoice of an order", None, 80),
        items=1,
        says="rendered the invoice",
        parameter="order: int = 0",
        raises=NO_VAT_ID,
        condition="order % 10_000 in (9_182, 9_187)",
        complains='f"order {order}: customer without vat_id, rendered nothing"',
    ),
    Part(
        *(
            "warehouse_export",
            "Export all stock movements to the warehouse",
            "0 */3 * * *",
            5_880,
            "UTC",
            0.08,
        ),
        items=8_200_000,
        says="exported movements",
        owner="warehouse #warehouse",
        runbook=f"{WIKI}/warehouse-export",
        attributes=(
            ("overlap", '"wait"'),
            ("timeout", "6 * 3600.0"),
            ("deadline", "timedelta(hours=4)"),
        ),
        is_old=True,
    ),
    Part(
        *("partner_feed", "Read the price file of the partner", "0 * * * *", 190),
        items=5_310,
        says="read prices",
        owner="partners #partners",
        attributes=(("retry", "Retry(attempts=5, wait=1200, factor=1, jitter=0)"),),
        flaky=(WAIT_FOR_FILE, 0.08),
        raises=WAIT_FOR_FILE,
    ),
    Part(
        "session_sweep",
        "End idle sessions",
        "*/5 * * * *",
        7,
        items=310,
        says="ended",
        attributes=(_SKIP,),
    ),
    Part(
        *("price_check", "Compare prices with those of the shop", "*/5 * * * *", 24),
        items=1_900,
        says="compared prices",
        owner="pricing #pricing",
    ),
    Part(
        *("thumbnails", "Make thumbnails of new pictures", "*/10 * * * *", 150, "UTC", 0.38),
        items=420,
        says="made thumbnails",
        owner="media #media",
    ),
    Part(
        *("orders_import", "Import new orders of the shop", "*/15 * * * *", 190, BERLIN),
        items=64,
        says="imported orders",
        owner="shop #shop-data",
        runbook=f"{WIKI}/orders-import",
        parameter="slot: datetime",
    ),
    Part(
        "cleanup_uploads",
        "Delete abandoned uploads",
        "*/30 * * * *",
        45,
        items=88,
        says="deleted",
        owner="media",
    ),
    Part(
        *("email_digest", "Send the digest to all readers", "0 6 * * *", 560, BERLIN),
        items=18_400,
        says="sent digests",
        owner="growth #growth",
        is_old=True,
    ),
    Part(
        *("search_reindex", "Build the search index anew", "0 */4 * * *", 2_800, "UTC", 0.05),
        items=910_000,
        says="indexed documents",
        owner="search #search",
        is_old=True,
    ),
    Part(
        "stock_levels",
        "Count the stock",
        "20 * * * *",
        175,
        items=7_200,
        says="counted",
        owner="warehouse",
    ),
    Part(
        "report_render",
        "Render a report for a customer",
        None,
        420,
        items=1,
        says="rendered",
        owner="sales",
    ),
)
_SHIPPED = (
    Part("backup", "Create a backup of the database", "0 2 * * *", 400, spread=0.05, is_old=True),
    Part(
        *(
            "restore_drill",
            "Restore the latest backup into a scratch database, and compare the counts",
        ),
        *("0 4 * * *", 185),
        spread=0.05,
        is_old=True,
    ),
)
SHIPPED = tuple(part.name for part in _SHIPPED)
"""Tasks that come with the package."""

_Row = tuple[str, str, str, float, int, str, str]
_HOURLY: Sequence[_Row] = (
    ("currency_rates", "Fetch exchange rates", "0 * * * *", 12, 160, "fetched rates", "treasury"),
    (
        "fraud_scores",
        "Score the new payments",
        "*/30 * * * *",
        95,
        720,
        "scored payments",
        "risk #risk",
    ),
    (
        "crm_sync",
        "Send changed customers to the CRM",
        "10 * * * *",
        240,
        1_300,
        "sent customers",
        "sales",
    ),
    (
        "mail_bounces",
        "Mark addresses that bounce",
        "10 * * * *",
        8,
        40,
        "marked addresses",
        "growth #growth",
    ),
    (
        "tracking_poll",
        "Ask the carriers where parcels are",
        "50 * * * *",
        140,
        2_600,
        "asked",
        "shop #shop-data",
    ),
    (
        "webhook_retries",
        "Send webhooks again that failed",
        "52 * * * *",
        20,
        17,
        "sent webhooks",
        "platform",
    ),
    (
        "cache_warm",
        "Warm the cache of the start page",
        "55 * * * *",
        60,
        900,
        "warmed pages",
        "platform",
    ),
    (
        "catalog_sync",
        "Sync the catalogue with the PIM",
        "40 * * * *",
        700,
        31_000,
        "synced products",
        "shop #shop-data",
    ),
    (
        "search_suggest",
        "Count search terms",
        "45 * * * *",
        75,
        4_100,
        "counted terms",
        "search #search",
    ),
    (
        "inventory_diff",
        "Compare stock with the ERP",
        "0 * * * *",
        160,
        7_200,
        "compared products",
        "warehouse",
    ),
    (
        "exchange_feed",
        "Publish offers to marketplaces",
        "0 * * * *",
        35,
        2_200,
        "published offers",
        "partners",
    ),
    (
        "ticket_sla",
        "Escalate tickets that wait",
        "30 * * * *",
        15,
        12,
        "escalated tickets",
        "support",
    ),
    (
        "ads_spend",
        "Fetch what ads have cost",
        "35 * * * *",
        50,
        380,
        "fetched campaigns",
        "growth #growth",
    ),
    (
        "usage_meter",
        "Sum up the use of the API",
        "0 * * * *",
        110,
        9_800,
        "summed up calls",
        "platform",
    ),
    ("sla_report", "Measure response times", "0 * * * *", 65, 3_600, "measured", "platform"),
    ("geo_cache", "Refresh places of addresses", "0 * * * *", 85, 540, "refreshed places", "data"),
    (
        "seo_sitemap",
        "Write the sitemap",
        "0 */2 * * *",
        90,
        31_000,
        "wrote addresses",
        "growth #growth",
    ),
    (
        "ab_results",
        "Evaluate the running experiments",
        "0 */2 * * *",
        210,
        23,
        "evaluated experiments",
        "data",
    ),
    (
        "ledger_reconcile",
        "Reconcile postings with the bank",
        "30 1-23/2 * * *",
        1_500,
        5_400,
        "reconciled",
        "finance",
    ),
    (
        "risk_limits",
        "Compute the limits of customers",
        "0 */6 * * *",
        320,
        48_112,
        "computed limits",
        "risk #risk",
    ),
)
_SELDOM: Sequence[tuple[_Row, str]] = (
    (
        (
            "gdpr_erasure",
            "Erase customers who asked for it",
            "0 3 * * *",
            260,
            9,
            "erased",
            "legal",
        ),
        BERLIN,
    ),
    (
        (
            "data_mart",
            "Build the tables for analysts",
            "30 4 * * *",
            2_400,
            2_100_000,
            "built rows",
            "data",
        ),
        BERLIN,
    ),
    (
        ("kpi_mail", "Send the figures of yesterday", "0 7 * * *", 30, 42, "sent mails", "data"),
        BERLIN,
    ),
    (
        (
            "gl_posting",
            "Post the day to the general ledger",
            "30 23 * * *",
            900,
            5_400,
            "posted",
            "finance",
        ),
        BERLIN,
    ),
    (
        (
            "customer_export",
            "Export customers to the archive",
            "30 1 * * *",
            1_300,
            48_112,
            "exported",
            "data",
        ),
        BERLIN,
    ),
    (
        (
            "log_rotate",
            "Pack the logs of yesterday",
            "10 0 * * *",
            25,
            61,
            "packed files",
            "platform",
        ),
        "UTC",
    ),
    (
        (
            "ktm_timesheets",
            "Collect timesheets in Kathmandu",
            "0 7 * * *",
            60,
            35,
            "collected",
            "people",
        ),
        KATHMANDU,
    ),
    (
        (
            "shift_plan",
            "Plan the shifts of the week",
            "12 8 * * 0",
            480,
            120,
            "planned shifts",
            "people",
        ),
        BERLIN,
    ),
    (
        (
            "weekly_close",
            "Close the week",
            "0 9 * * 0",
            1_900,
            36_000,
            "closed accounts",
            "finance",
        ),
        BERLIN,
    ),
)


_DEADLINES = {"data_mart": "07:00", "weekly_close": "12:00"}


def _part(row: _Row, zone: str = "UTC", *, is_old: bool = False) -> Part:
    name, description, cron, usual, items, says, owner = row
    is_flaky = name == "tracking_poll"
    promised = (("deadline", f'"{_DEADLINES[name]}"'),) if name in _DEADLINES else ()
    return Part(
        *(name, description, cron, usual, zone),
        items=items,
        says=says,
        owner=owner,
        is_old=is_old,
        flaky=('httpx.ConnectTimeout("tracking.carrier.example")', 0.05) if is_flaky else None,
        attributes=(("retry", "Retry(attempts=3, wait=30)"),) if is_flaky else promised,
    )


CAST: Sequence[Part] = (
    *_TOLD,
    *_SHIPPED,
    *(_part(row) for row in _HOURLY),
    *(_part(row, zone, is_old=True) for row, zone in _SELDOM),
)
PARTS = {part.name: part for part in CAST}

FEED_BEFORE = "0 */2 * * *"
"""The schedule of partner_feed before the deploy."""
