"""Fields of the results about a run: what the ledger has on it about incidents."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel


class RunMarks(BaseModel):
    """`fingerprint`: what is wrong with the run, as a class of errors. `noticed_at`: when the watch has seen its end.

    `acknowledged`: the incident with which a person has acknowledged it. `made_good_by`: the run whose success made it
    good, which may be the run itself.
    """

    fingerprint: str | None
    noticed_at: datetime | None
    acknowledged: str | None
    made_good_at: datetime | None
    made_good_by: str | None
