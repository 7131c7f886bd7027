"""The pages of a started application, for people of each role who have signed in with a form."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import pytest

from batch_system.operations.asking.actor import ROLES, Role
from tests.batch.ledger_world import until
from tests.web.conftest import Served, client_of
from tests.web.conftest import served as served


@dataclass
class Person:
    """A browser without JavaScript in which somebody has signed in."""

    client: httpx.AsyncClient
    role: Role

    async def page(self, path: str, status: int = 200) -> str:
        """The HTML of a page."""
        answer = await self.client.get(path)
        assert answer.status_code == status, (path, answer.status_code, answer.text[:2_000])
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        return answer.text

    async def csrf(self) -> str:
        """What the forms of this person send back."""
        found = re.search(r'name="csrf" value="([0-9a-f]+)"', await self.page("/you"))
        assert found is not None
        return found[1]

    async def send(self, path: str, status: int = 303, **fields: str) -> httpx.Response:
        """Send the form of a page."""
        answer = await self.client.post(path, data={"csrf": await self.csrf(), **fields})
        assert answer.status_code == status, (path, answer.status_code, answer.text[:2_000])
        return answer


@dataclass
class People:
    """`nobody` has not signed in."""

    viewer: Person
    operator: Person
    admin: Person
    nobody: httpx.AsyncClient
    served: Served

    def of(self, role: Role) -> Person:
        """The person with this role."""
        person: Person = getattr(self, role)
        return person


@pytest.fixture
async def people(served: Served) -> AsyncIterator[People]:
    found: dict[str, Person] = {}
    for role in ROLES:
        client = client_of(served.service_app)
        signed_in = await client.post("/signin", data={"secret": served.secrets[role], "next": "/"})
        assert (signed_in.status_code, signed_in.headers["location"]) == (303, "/")
        found[role] = Person(client, role)
    yield People(**found, nobody=served.nobody, served=served)
    for person in found.values():
        await person.client.aclose()


async def failed_run(person: Person) -> str:
    """The id of a run by hand that has failed."""
    started = await person.send("/tasks/report/start", **{"param-day": "never"})
    path = str(started.headers["location"])

    async def has_failed() -> bool:
        return "Failed" in await person.page(path)

    await until(has_failed)
    return path.rpartition("/")[2]
