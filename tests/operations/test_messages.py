"""The list of messages about incidents: by state, by channel, and page by page."""

from __future__ import annotations

import pytest

from batch_system import clock
from batch_system.batch.ledger.incidents import outbox
from batch_system.batch.ledger.incidents.outbox import Note
from batch_system.database.engine import Database
from batch_system.errors import Forbidden, InvalidParameters
from batch_system.operations.asking.actor import Actor
from batch_system.operations.asking.context import Loaded
from batch_system.operations.operations import Operations
from batch_system.settings.settings import Settings
from batch_system.verbs.incidents import ListMessages


async def test_messages_are_listed_by_their_state_and_channel(ledger: Database) -> None:
    now = clock.now()
    async with ledger.engine.begin() as connection:
        for channel in ("mail", "chat", "pager"):
            await outbox.write(connection, [Note(channel, "opened", {"text": "x"})], now)
        by_channel = {row.channel: row for row in await connection.execute(outbox.listing(10))}
        await outbox.sent(connection, [by_channel["mail"]], now)
        await outbox.given_up(connection, [by_channel["pager"]], "410 Gone", now)
    operations = Operations(ledger, ledger, Loaded, Settings(), are_ready=True)
    found = (await operations(ListMessages())).messages
    assert {each.channel: (each.state, each.error) for each in found} == {
        "mail": ("sent", None),
        "chat": ("waiting", None),
        "pager": ("given_up", "410 Gone"),
    }
    (stuck,) = (await operations(ListMessages(state="given_up"))).messages
    assert (stuck.channel, stuck.attempts) == ("pager", 1)
    assert len((await operations(ListMessages(channel="chat"))).messages) == 1
    first = await operations(ListMessages(limit=2))
    rest = await operations(ListMessages(limit=2, after=first.after))
    assert [each.id for each in (*first.messages, *rest.messages)] == [each.id for each in found]
    assert rest.after is None
    with pytest.raises(InvalidParameters, match="state"):
        ListMessages(state="lost")
    with pytest.raises(Forbidden):
        await operations.by(Actor("vera", "viewer", "api"))(ListMessages())
