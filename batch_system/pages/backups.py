"""The pages about backups: which exist, what was checked, what differs between two of them, and a
download.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from batch_system.backup.comparing.differences import Difference
from batch_system.operations.backups.named import NamedBackups
from batch_system.operations.backups.results import BackupSummary
from batch_system.operations.system.settings import used
from batch_system.pages.frame.answers import GoTo, back
from batch_system.pages.frame.confirm import Confirm, confirm
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.web.problems import Refused

MOST = 200
"""At most this many backups are shown: the newest ones."""
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")
HEIGHTS = {"weekly": 16.0, "monthly": 24.0}
"""The heights of marks in the strip, in pixels, by why a backup is kept. Other marks are short."""
SHORT = 10.0


@dataclass(frozen=True)
class Mark:
    """A backup in the strip. `x`: in percent. `shape`: bar, pin or cross. `css`: that of a state of
    runs.
    """

    x: float
    height: float
    shape: str
    css: str
    words: str


async def show_backups(request: Request, viewer: Viewer) -> str:
    """The backups of each place, the newest first."""
    found, warnings = await _listed(viewer)
    settings = {each.name: each.value for each in used(viewer.operations.context.settings).settings}
    return await render(
        "backups.html",
        **await shell_of(viewer, "backups", "Backups"),
        backups=found,
        newest=next((each for each in found if _is_good(each)), None),
        bad=[each for each in found if each.failed_at is not None],
        pinned=sum(1 for each in found if each.pinned),
        limit=float(settings["BATCH_ALERT_BACKUP_AFTER"] or 0),
        marks=_marks(found[:MOST], viewer.now),
        most=MOST,
        warnings=warnings,
    )


async def _listed(viewer: Viewer) -> tuple[list[BackupSummary], list[str]]:
    """Which backups exist, and what could not be read. The warnings of the listing contain
    addresses, which are not shown.
    """
    warnings: list[str] = []
    found = await NamedBackups(viewer.operations.context).list(warnings.append)
    words = "A place of backups, or the ledger, could not be read: the log of the service says why."
    return list(found), [words] if warnings else []


def _is_good(backup: BackupSummary) -> bool:
    return backup.verified_at is not None and backup.failed_at is None


def _marks(backups: Sequence[BackupSummary], now: datetime) -> list[Mark]:
    """The strip from the oldest backup to now."""
    if not backups:
        return []
    begin = min(each.taken_at for each in backups)
    length = max((now - begin).total_seconds(), 1.0)
    return [
        _mark(each, (each.taken_at - begin).total_seconds() / length) for each in reversed(backups)
    ]


def _mark(backup: BackupSummary, share: float) -> Mark:
    if backup.failed_at is not None:
        shape, css = "cross", "failed"
    elif backup.pinned:
        shape, css = "pin", "running"
    else:
        shape, css = "bar", "succeeded" if _is_good(backup) else "queued"
    x = round(1 + 98 * min(max(share, 0.0), 1.0), 2)
    return Mark(
        x,
        HEIGHTS.get(backup.kept, SHORT),
        shape,
        css,
        f"{backup.name}: {backup.check}, {backup.kept}",
    )


def _name_in(request: Request) -> str:
    return _checked(str(request.path_params["name"]))


def _checked(name: str) -> str:
    if NAME.fullmatch(name) is None:
        raise Refused(
            404, "there is no backup of this name: allowed is a name that the page Backups shows"
        )
    return name


async def ask_to_verify(request: Request, viewer: Viewer) -> str:
    """Say what verifying does."""
    name = _name_in(request)
    words = [
        "Every byte is read and compared with the checksums in the backup, and the outcome is "
        "recorded.",
        "It takes as long as reading the file. `batch backup verify --restore` also restores it "
        "into a scratch place.",
    ]
    return await confirm(
        viewer, "backups", Confirm(f"Verify {name}?", words, "Verify", "Leave it", "/backups")
    )


async def verify(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Verify the backup."""
    await NamedBackups(viewer.operations.context).verify(_name_in(request))
    return back(fields, "/backups")


async def pin(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Keep the backup until it is unpinned."""
    await NamedBackups(viewer.operations.context).pin(_name_in(request))
    return back(fields, "/backups")


async def unpin(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Allow pruning to delete the backup again."""
    await NamedBackups(viewer.operations.context).unpin(_name_in(request))
    return back(fields, "/backups")


async def download(request: Request, viewer: Viewer) -> Response:
    """The file of a backup in BACKUP_DIR."""
    file = await NamedBackups(viewer.operations.context).to_download(_name_in(request))
    return FileResponse(file, media_type="application/octet-stream", filename=file.name)


async def show_differences(request: Request, viewer: Viewer) -> str:
    """What differs between two backups, or between one and the database as it is.
    `?from=NAME&to=NAME`.
    """
    found, warnings = await _listed(viewer)
    before, after = request.query_params.get("from", ""), request.query_params.get("to", "")
    difference = None
    if before:
        difference = await NamedBackups(viewer.operations.context).diff(
            _checked(before), _checked(after) if after else None
        )
    return await render(
        "differences.html",
        **await shell_of(viewer, "backups", "Differences between backups"),
        names=list(dict.fromkeys(each.name for each in found))[:MOST],
        before=before,
        after=after,
        difference=difference,
        bars=_bars(difference) if difference is not None else {},
        is_answer=True,  # comparing takes long, so the page is not refreshed
        swapped=urlencode({"from": after, "to": before}) if before and after else "",
        warnings=warnings,
    )


def _bars(difference: Difference) -> dict[str, float]:
    """The length of each table's bar, in percent: how many rows differ, on a logarithmic scale."""
    numbers = {
        each.table: (each.added or 0) + (each.changed or 0) + (each.removed or 0)
        for each in difference.tables
    }
    most = max(numbers.values(), default=0)
    return {
        table: round(100 * math.log1p(n) / math.log1p(most), 1) if n else 0.0
        for table, n in numbers.items()
    }
