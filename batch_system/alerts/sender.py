"""Sends the messages of the outbox, each channel by itself, on the one node that has the duty of
the watch.

A message may be sent twice only if that node ends between the answer of the receiver and the mark
in the ledger. It has the same id both times.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import Row
from sqlalchemy.exc import DBAPIError

from batch_system.alerts import sending
from batch_system.alerts.channels import WEBHOOK, Channel, Channels
from batch_system.alerts.messages import Content, Message, message_of, problems_of, still_news
from batch_system.alerts.sending import NotSent
from batch_system.batch.ledger import database_time, duties, run_logs
from batch_system.batch.ledger.duties import WATCH
from batch_system.batch.ledger.incidents import outbox
from batch_system.concurrency.background import TURN_SECONDS, Background
from batch_system.concurrency.limits import limited
from batch_system.concurrency.thread_pool import ThreadPool
from batch_system.database.engine import Database
from batch_system.errors import DatabaseError
from batch_system.logs import get_logger
from batch_system.metrics.process import ProcessMetrics

logger = get_logger("batch_system.batch")

LOOK_SECONDS = 1.0
LINES = 20
"""The line that is sent is one of this many last lines of a log."""
FIRST_WAIT, LONGEST_WAIT = 10.0, 3_600.0
"""Seconds until a message that could not be sent is tried again: from ten seconds, doubled each
time, up to an hour.
"""
GIVE_UP_AFTER = timedelta(days=1)


class Sender(Background):
    """`holds`: whether this node has the duty of the watch. `public_url`: that of this service, for
    links, if it has one.
    """

    def __init__(
        self,
        ledger: Database,
        node: str,
        channels: Channels,
        holds: Callable[[], bool],
        secret: str | None = None,
        public_url: str | None = None,
        metrics: ProcessMetrics | None = None,
    ) -> None:
        self._metrics = metrics or ProcessMetrics()
        self._metrics.announce(channels.by_name)
        self._ledger = ledger
        self._node = node
        self._channels = channels
        self._holds = holds
        self._secret = secret
        self._public_url = public_url
        self._woken = asyncio.Event()
        self._woken.set()
        self._next: dict[str, datetime] = {}
        self._threads = ThreadPool(max(1, min(8, len(channels.by_name))))
        self._sending: dict[str, asyncio.Task[None]] = {}

    def wake(self) -> None:
        """There may be something new to send."""
        self._woken.set()

    async def stop(self) -> None:
        await super().stop()
        for task in self._sending.values():
            task.cancel()
        if self._sending:
            await asyncio.wait(self._sending.values())

    async def _loop(self) -> None:
        while True:
            try:
                async with asyncio.timeout(LOOK_SECONDS if self._next else None):
                    await self._woken.wait()
            except TimeoutError:
                pass
            try:
                async with self.limited_turn():
                    await self._look()
            except (DBAPIError, DatabaseError, OSError) as error:
                logger.warning(
                    "messages can't be read from the ledger; it is tried again: "
                    f"{self._ledger.why(error)}"
                )
                await asyncio.sleep(FIRST_WAIT)
            except Exception:  # the background loop's boundary
                logger.exception("messages can't be read from the ledger; it is tried again")
                await asyncio.sleep(FIRST_WAIT)

    async def _look(self) -> None:
        """Begin to send to each channel with a message that is due."""
        if not self._holds():  # the watch wakes the sender of the node that takes the duty
            self._woken.clear()
            self._next = {}
            return
        if self._woken.is_set():
            self._woken.clear()
            async with self._ledger.reader.connect() as connection:
                due_at = await outbox.next_due(connection)
            self._next = {
                name: due for name, due in due_at.items() if name in self._channels.by_name
            }
            if due_at.keys() - self._next.keys():
                await self._give_up_unknown(due_at.keys() - self._next.keys())
        now = await self._now() if self._next else None
        for name, due in self._next.items():
            if now is not None and due <= now and name not in self._sending:
                task = asyncio.create_task(
                    self._send_all(self._channels.by_name[name]), name=f"batch-sender {name}"
                )
                self._sending[name] = task
                task.add_done_callback(partial(self._done, name))

    async def _give_up_unknown(self, names: Collection[str]) -> None:
        """Give up messages to channels that the settings no longer have, once the messages are a
        day old.
        """
        async with self._ledger.engine.begin() as connection:
            now = await database_time.now_of(connection)
            await outbox.give_up(
                connection, names, now - GIVE_UP_AFTER, "the settings have no such channel", now
            )

    def _done(self, name: str, _: asyncio.Task[None]) -> None:
        self._sending.pop(name, None)
        self._woken.set()

    async def _now(self) -> datetime:
        async with self._ledger.reader.connect() as connection:
            return await database_time.now_of(connection)

    async def _send_all(self, channel: Channel) -> None:
        try:
            while await self._send_next(channel):
                pass
        except (DBAPIError, DatabaseError, OSError) as error:
            logger.warning(
                f"sending to the channel {channel.name} failed; it is tried again: "
                f"{self._ledger.why(error)}"
            )
            await asyncio.sleep(FIRST_WAIT)
        except Exception:  # the background loop's boundary
            logger.exception(f"sending to the channel {channel.name} failed; it is tried again")
            await asyncio.sleep(FIRST_WAIT)

    async def _send_next(self, channel: Channel) -> bool:
        """Send the next message to this channel. Returns whether it was sent, so that there may be
        another one.
        """
        async with limited(TURN_SECONDS), self._ledger.engine.begin() as connection:
            if not await duties.hold(connection, WATCH, self._node):
                return False
            rows = await outbox.take(
                connection, channel.name, await database_time.now_of(connection)
            )
            lines = await self._last_lines(connection, rows)
        if not rows:
            return False
        try:
            await self._send(channel, rows, lines)
        except NotSent as error:
            await self._failed(channel, rows, error)
            return False
        async with limited(TURN_SECONDS), self._ledger.engine.begin() as connection:
            await outbox.sent(connection, rows, await database_time.now_of(connection))
        self._metrics.notifications[channel.name, "sent"] += 1
        return True

    async def _send(
        self, channel: Channel, rows: Sequence[Row[Any]], lines: dict[str, str]
    ) -> None:
        message = rows[0].message
        if channel.name == WEBHOOK:
            events = [
                {"event": row.kind, "incident": row.content, "link": self._link(row.content)}
                | ({"problem": problem} if problem is not None else {})
                for row, problem in problems_of(rows)
            ]
            await sending.post(channel, self._secret, message, events)
            return
        if channel.keeps_incidents:
            for row in rows:
                alone = message_of(message, [(row.kind, row.content)], self._link, lines)
                incident = row.incident or row.id
                await self._threads.run(
                    sending.notify, channel, alone, row.kind == "closed", incident
                )
            return
        notes = still_news([(row.kind, row.content) for row in rows])
        if not notes:
            return
        made: Message = message_of(message, notes, self._link, lines)
        is_good = all(kind in ("closed", "digest", "test") for kind, _ in notes)
        await self._threads.run(sending.notify, channel, made, is_good)

    async def _failed(self, channel: Channel, rows: Sequence[Row[Any]], error: NotSent) -> None:
        attempts = rows[0].attempts + 1
        wait = error.wait or min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempts - 1))
        async with limited(TURN_SECONDS), self._ledger.engine.begin() as connection:
            now = await database_time.now_of(connection)
            if error.is_final or now + timedelta(seconds=wait) > rows[0].created_at + GIVE_UP_AFTER:
                await outbox.given_up(connection, rows, error.reason, now)
                self._metrics.notifications[channel.name, "given_up"] += 1
                logger.error(f"a message to the channel {channel.name} is given up: {error.reason}")
                return
            await outbox.failed(connection, rows, error.reason, now + timedelta(seconds=wait))
        self._metrics.notifications[channel.name, "failed"] += 1
        logger.warning(
            f"a message to the channel {channel.name} could not be sent, the next attempt is in "
            f"{wait:g} s: {error.reason}"
        )

    async def _last_lines(self, connection: Any, rows: Sequence[Row[Any]]) -> dict[str, str]:
        """The last line of the logs of the runs that the messages are about, by the id of the
        run.
        """
        told = [
            row.content for row in rows if row.kind != "closed" and not row.content.get("is_secret")
        ]
        runs = {content.get("run") for content in told} - {None}
        tails = {run: await run_logs.tail(connection, run, LINES) for run in sorted(runs)[:20]}
        lines = {run: run_logs.telling_line(tail) for run, tail in tails.items()}
        return {run: line.text.split("\n")[0] for run, line in lines.items() if line is not None}

    def _link(self, content: Content) -> str | None:
        if self._public_url is None or content.get("id") is None:
            return None
        return f"{self._public_url}/incidents/{content['id']}"
