"""What a person can do about a damaged SQLite file. Alone, because only this part of the server
knows backups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import make_url

from batch_system.backup.file.folder import taken_at
from batch_system.backup.places.place import Places
from batch_system.errors import DatabaseDamaged
from batch_system.settings.settings import Settings


@contextmanager
def damage_explained(settings: Settings) -> Iterator[None]:
    """Add advice to the error about a damaged file. That blocks, because it lists the folder of the
    backups.
    """
    try:
        yield
    except DatabaseDamaged as error:
        raise DatabaseDamaged(
            f"{error.message} {after_damage(settings, error.file)}", error.file
        ) from error


def after_damage(settings: Settings, file: str) -> str:
    """What to do. For the application's database it names the newest backup in BACKUP_DIR."""
    moved = f"Stop all services, and move {file} and the files beside it away"
    if file == make_url(settings.ledger_url).database:
        return (
            f"{moved}: a service then begins with a new ledger, so tasks fire from then on, and "
            "their history is lost. "
            "Backups do not include the ledger; `sqlite3 FILE .recover` saves what can be read"
        )
    names = [
        name for name in Places.of(settings).folder.listed() if taken_at(Path(name)) is not None
    ]
    if not names:
        return (
            f"{moved}. There is no backup in {settings.BACKUP_DIR} (BACKUP_DIR) that could be "
            "restored"
        )
    return f"{moved}; then restore the newest backup: batch backup restore {max(names)}"
