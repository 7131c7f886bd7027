"""A pooler in transaction mode, such as PgBouncer: each transaction may use another session of the
server, so a setting is sent with each BEGIN, and nothing is kept in a session.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # the process that makes a backup imports no SQLAlchemy
    from sqlalchemy import Row

Pooler = Literal["transaction"]
SETTING = "BATCH_DATABASE_POOLER"

PROOF = (
    "SELECT current_setting('jit', true) AS jit, "
    "current_setting('plan_cache_mode', true) AS plans, quote_ident(current_user) AS role, "
    "pg_backend_pid() AS process, "
    "EXISTS (SELECT 1 FROM pg_prepared_statements WHERE name LIKE '__asyncpg%') AS has_names"
)
"""What shows whether the settings that a connection has asked for are in force in its transactions,
and whether the server knows prepared statements by the names that clients give to them, which are
the same for each process.
"""

MIXED_UP = 'prepared statement "'
_ADVICE = {
    "unsupported startup parameter": "a pooler stands before the server, such as PgBouncer. If its "
    f"pool_mode is transaction, set {SETTING}=transaction",
    MIXED_UP: "the pooler does not keep the prepared statements of its clients apart: set "
    "max_prepared_statements = 200 in the settings of PgBouncer, of version 1.21 or newer",
    "statement pooling mode": "set pool_mode = transaction in the settings of PgBouncer",
}
"""What to do about an error that only a pooler causes, by words of its message."""


def with_begin(settings: Mapping[str, str]) -> str:
    """The statements that set these settings for one transaction."""
    return " ".join(f"SET LOCAL {name} = '{value}';" for name, value in settings.items())


def refusal(row: Row[Any], pooler: Pooler | None, process: int) -> str | None:
    """Why a connection can't be used, if the answer to PROOF shows that; or else None.

    `process`: that of the server, as the connection was told when it began. A pooler makes one up.
    """
    if pooler and row.has_names and row.process != process:
        return f"{_ADVICE[MIXED_UP]}. Else one process would execute the statements of another"
    if row.jit != "on" and row.plans != "auto":
        return None
    is_transactions = f"set {SETTING}=transaction if its mode is transaction, or "
    return (
        f"a pooler before the server drops settings, so that jit is {row.jit} and plan_cache_mode "
        f"is {row.plans}. Polls would take seconds, and nodes would lose their leases: "
        f"{'' if pooler else is_transactions}execute `ALTER ROLE {row.role} SET jit = off; "
        f"ALTER ROLE {row.role} SET plan_cache_mode = force_custom_plan`, and let the pooler "
        "connect anew"
    )


def advice_on(message: str) -> str | None:
    """What to do about an error with this message, if only a pooler causes it."""
    return next((advice for words, advice in _ADVICE.items() if words in message), None)
