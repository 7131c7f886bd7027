"""Actor: the person or program that asks for an operation, the door it uses, and what it may do."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Literal, get_args

from batch_system.errors import Forbidden
from batch_system.escaping import echoed

if TYPE_CHECKING:
    from batch_system.batch.ledger.people.audit import By


Role = Literal["viewer", "operator", "admin"]
"""A viewer reads, an operator also changes runs and tasks, an admin also manages tokens, pins and
pruning.
"""
Source = Literal["api", "cli", "page", "service"]

ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Actor:
    """Who asks. `name`: a person or a token. `address`: where the request came from. `token`: the
    key of its token.

    `until`: when the session of a person ends (UTC).
    """

    name: str
    role: Role = "admin"
    source: Source = "cli"
    address: str | None = None
    token: str | None = None
    until: datetime | None = None

    def may(self, role: Role) -> bool:
        """Whether this actor may do what needs `role`."""
        return ROLES.index(self.role) >= ROLES.index(role)

    @property
    def by(self) -> By:
        """The same for the audit."""
        from batch_system.batch.ledger.people.audit import By

        return By(self.name, self.source, self.role, self.address)


def refuse_lower_role(actor: Actor, role: Role) -> None:
    """Raises Forbidden if this actor may not do what needs `role`."""
    if not actor.may(role):
        raise Forbidden(f"this needs the role {role}; {echoed(actor.name)} is {actor.role}")
