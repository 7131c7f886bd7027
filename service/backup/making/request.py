"""What is to be backed up, and into which file: plain values, so that another process can be told."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from service.backup.file.selection import Selection


@dataclass(frozen=True)
class Order:
    """`arguments` are the connection's: they may hold a password. `shown` is the database for messages, without it.

    `setting` names the database.
    """

    kind: str
    database: str
    shown: str
    started: datetime
    selection: Selection
    arguments: dict[str, Any] = field(default_factory=dict, repr=False)
    setting: str = "DATABASE_URL"

    def as_json(self, partial: Path) -> bytes:
        """One line, with the file to write and the process that orders it."""
        more = {"started": self.started.isoformat(), "partial": str(partial), "by": os.getpid()}
        return json.dumps({**asdict(self), **more}).encode() + b"\n"

    @classmethod
    def from_json(cls, line: bytes) -> tuple[Self, Path, int]:
        values = json.loads(line)
        partial, by = Path(values.pop("partial")), values.pop("by")
        chosen = values.pop("selection")
        selection = Selection(tuple(chosen["include"]), tuple(chosen["exclude"]), chosen["ledger"])
        return cls(**{**values, "started": datetime.fromisoformat(values["started"])}, selection=selection), partial, by
