"""Writes to the audit that this process starts or stops, and what has changed since the last
start.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger.people import audit
from batch_system.batch.ledger.people.audit import By
from batch_system.redaction import MASK, Redaction
from batch_system.settings.settings import SECRET, Settings

START, STOP, DEPLOY, SETTINGS = "service.start", "service.stop", "service.deploy", "settings.change"


async def record_start(
    connection: AsyncConnection,
    node: str,
    settings: Settings,
    versions: Mapping[str, str],
    now: datetime,
) -> None:
    """Record the start of the service. `versions`: `package` and `application`."""
    by = this_process()
    shown = _settings(settings)
    last = await audit.newest(connection, START)
    after = {"versions": dict(versions), "settings": shown}
    if last is not None and isinstance(last["after"], Mapping):
        before = last["after"]
        if before.get("versions") != after["versions"]:
            key = f"{DEPLOY} {_hash_of(versions)} {last['id']}"
            await audit.record(
                connection,
                by,
                DEPLOY,
                now,
                before=before.get("versions"),
                after=after["versions"],
                key=key,
            )
        await _record_settings(connection, by, before.get("settings"), shown, str(last["id"]), now)
    await audit.record(connection, by, START, now, target=node, after=after)


async def record_stop(connection: AsyncConnection, node: str, now: datetime) -> None:
    """Record that the service stops."""
    await audit.record(connection, this_process(), STOP, now, target=node)


def this_process() -> By:
    """This process, as the audit names it."""
    return By(f"pid {os.getpid()}", "service", None, socket.gethostname())


async def _record_settings(
    connection: AsyncConnection,
    by: By,
    before: Any,
    after: Mapping[str, Any],
    last: str,
    now: datetime,
) -> None:
    if not isinstance(before, Mapping):
        return
    names = sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    )
    if not names:
        return
    old, new = ({name: _shown(values.get(name)) for name in names} for values in (before, after))
    key = f"{SETTINGS} {_hash_of(after)} {last}"
    await audit.record(
        connection, by, SETTINGS, now, target=", ".join(names)[:500], before=old, after=new, key=key
    )


def _settings(settings: Settings) -> dict[str, Any]:
    """The settings as JSON. For a setting that may be secret only a mark is stored, which shows
    changes.
    """
    redaction = Redaction.of(settings.BATCH_SECRET_WORDS)
    values = settings.model_dump(mode="json", include=set(Settings.model_fields))
    ordinary = {"BATCH_SECRET_WORDS"}
    return {
        name: f"{MASK} {_hash_of([name, str(getattr(settings, name))])}"
        if value is not None
        and name not in ordinary
        and (name.endswith(SECRET) or redaction.is_secret(name))
        else value
        for name, value in values.items()
    }


def _shown(value: Any) -> Any:
    """A value without the mark of a secret."""
    return MASK if isinstance(value, str) and value.startswith(f"{MASK} ") else value


def _hash_of(value: Any) -> str:
    encoded = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(encoded).hexdigest()[:16]
