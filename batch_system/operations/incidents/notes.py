"""The note that a person must give to acknowledge something, or to leave it as it is."""

from __future__ import annotations

from batch_system.errors import InvalidParameters

SHORTEST_NOTE, LONGEST_NOTE = 3, 500
"""Characters, without blanks at the ends."""
NEEDED = f"{SHORTEST_NOTE} to {LONGEST_NOTE} characters are needed, which say why"


def check_note(note: str | None) -> str:
    """Returns the note. Raises InvalidParameters if there is none, or if it is too short or too
    long.
    """
    if note is None or not SHORTEST_NOTE <= len(note.strip()) <= LONGEST_NOTE:
        raise InvalidParameters(f"note: {NEEDED}")
    return note
