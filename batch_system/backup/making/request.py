"""The request for a backup: plain values that can be sent to another process."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from batch_system.backup.file.selection import Selection


@dataclass(frozen=True)
class BackupRequest:
    """The database to back up, and the selection of its tables.

    `arguments`: connection arguments, which may include a password. `safe_url`: the database's URL
    without a password, for messages. `setting`: the setting that holds the URL. `started`: when the
    backup was requested (UTC).
    """

    kind: str
    database: str
    safe_url: str
    started: datetime
    selection: Selection
    arguments: dict[str, Any] = field(default_factory=dict, repr=False)
    setting: str = "DATABASE_URL"

    def as_json(self, partial: Path) -> bytes:
        """The request as one line of JSON, with the file to write and the process id of the
        caller.
        """
        extra = {"started": self.started.isoformat(), "partial": str(partial), "by": os.getpid()}
        return json.dumps({**asdict(self), **extra}).encode() + b"\n"

    @classmethod
    def from_json(cls, line: bytes) -> tuple[Self, Path, int]:
        """The request, the file to write, and the process id of the caller, from a line of
        as_json().
        """
        values = json.loads(line)
        partial, caller = Path(values.pop("partial")), values.pop("by")
        fields = values.pop("selection")
        selection = Selection(tuple(fields["include"]), tuple(fields["exclude"]), fields["ledger"])
        started = datetime.fromisoformat(values.pop("started"))
        return cls(**values, started=started, selection=selection), partial, caller
