"""The types of the fields of verbs, each once: what is allowed, and what it means."""

from __future__ import annotations

from typing import Annotated

from pydantic import StringConstraints

from batch_system.operations.asking.cursors import CURSOR
from batch_system.operations.asking.filter import ID, TEXT
from batch_system.operations.asking.filter import Ahead as Ahead
from batch_system.operations.asking.filter import Instant as Instant
from batch_system.operations.asking.filter import PoolName as PoolName
from batch_system.operations.asking.filter import Since as Since
from batch_system.operations.asking.filter import TaskName as TaskName
from batch_system.operations.asking.sentences import About, Allowed
from batch_system.operations.incidents.notes import LONGEST_NOTE, NEEDED, SHORTEST_NOTE

RunName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,100}$"),
    Allowed("allowed: the id of a run, at least six digits of it, or the name of a task"),
    About(
        "The id of the run, at least six digits of its beginning or end, or a task: its newest run."
    ),
]
IncidentId = Annotated[
    str,
    StringConstraints(pattern=r"^[0-9a-f-]{4,36}$"),
    Allowed("allowed: the id of an incident, or at least four last digits of an open one"),
    About("The id of the incident, or at least four last digits of an open one."),
]
PreviewId = Annotated[
    str,
    StringConstraints(pattern=ID),
    Allowed("allowed: the id of a preview"),
    About("The id of the preview."),
]
BackupName = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}$"),
    Allowed("allowed: the name of a backup, or latest"),
    About("The name of the backup, or `latest`."),
]
Cursor = Annotated[
    str,
    StringConstraints(pattern=CURSOR),
    Allowed("allowed: the cursor that a page of this list has given"),
    About("The cursor that the page before has given."),
]
LONGEST_WHY = 2_000
Note = Annotated[
    str,
    StringConstraints(max_length=LONGEST_WHY, pattern=TEXT),
    About("Why. It is recorded with the change."),
]
Reason = Annotated[
    str,
    StringConstraints(
        min_length=SHORTEST_NOTE,
        max_length=LONGEST_NOTE,
        pattern=r"^\s*[^\s\x00][^\x00]+[^\s\x00]\s*$",
    ),
    About(f"What is done about it, in {SHORTEST_NOTE} to {LONGEST_NOTE} characters."),
    Allowed(NEEDED),
]
"""A note of at least three characters, without those blanks that stand at its ends."""
