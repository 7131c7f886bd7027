"""Server-sent events: what changes in runs, tasks and nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Header, Query, Request
from pydantic import StringConstraints
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from batch_system import clock
from batch_system.web.live import Feed
from batch_system.web.problems import Refused
from batch_system.web.routes import Viewer, guard_of, router
from batch_system.web.stream import Event, Stream

events = router("events")

PING_SECONDS = 10.0
SEND_SECONDS = 30.0
"""A client that does not read for this time is disconnected."""
CHECK_SECONDS = 0.5
"""How long a stream waits for events before it looks whether there is something else to do."""
VALID_SECONDS = 5.0
"""How often a stream asks the ledger whether its token or session has expired. With many viewers
each stream asks about another session, so this is most of what an idle stream costs. The feed sees
a revocation the next time it reads the ledger.
"""
END_SECONDS = 1.0
"""At a stop of the service, the time that a client has to read what is being sent to it."""
TOPIC = r"^(runs|tasks|nodes|run:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})$"
Topic = Annotated[str, StringConstraints(pattern=TOPIC)]


class EventStream(Response):
    """Sends the events of topics until the client leaves, its token is revoked, or the service
    stops.

    A subclass may send something else about them: it overrides `texts_of` and `ping`.
    """

    media_type = "text/event-stream"

    def __init__(
        self, request: Request, topics: frozenset[str], owner: str, last_id: str | None
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._request = request
        self._topics = topics
        self._owner = owner
        self._last_id = last_id
        self._guard = guard_of(request)
        self._valid_at = clock.monotonic()
        self._revocations = self._guard.revocations()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        feed = self._guard.feed
        stream = feed.open(self._topics, self._owner, self._last_id)
        leaving = asyncio.create_task(_until_gone(receive))
        sending = asyncio.create_task(self._send_all(feed, stream, send))
        stopping = asyncio.create_task(feed.stopping.wait())
        try:
            await asyncio.wait({leaving, sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not leaving.done() and not sending.done():
                stream.wake()
                await asyncio.wait(
                    {leaving, sending}, timeout=END_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
        finally:
            feed.close(stream)
            for task in (leaving, sending, stopping):
                task.cancel()
            await asyncio.wait({leaving, sending, stopping})
        error = None if sending.cancelled() else sending.exception()
        if error is not None and not isinstance(error, TimeoutError | OSError):
            raise error

    async def _send_all(self, feed: Feed, stream: Stream, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await _send(send, b"retry: 2000\n\n")
        pinged = clock.monotonic()
        while not feed.stopping.is_set() and await self._is_valid():
            events = await stream.next(feed.reload, CHECK_SECONDS)
            await feed.turn()
            for text in await self.texts_of(events):
                await feed.turn()
                await _send(send, text)
            if clock.monotonic() - pinged >= PING_SECONDS:
                pinged = clock.monotonic()
                await _send(send, self.ping())
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _is_valid(self) -> bool:
        """Whether the client may still ask, by the last check."""
        now, revocations = clock.monotonic(), self._guard.revocations()
        if now - self._valid_at < VALID_SECONDS and self._revocations == revocations:
            return True
        self._valid_at = now
        self._revocations = revocations
        return await self._guard.still(self._request)

    async def texts_of(self, events: Sequence[Event]) -> Sequence[bytes]:
        """The texts to send for these events. Called at least every CHECK_SECONDS, even without
        events.
        """
        return [event.text for event in events]

    def ping(self) -> bytes:
        """What is sent every PING_SECONDS, so that the client knows that the stream is alive."""
        return b": ping\n\n"


async def _send(send: Send, body: bytes) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


EVENT: dict[str, Any] = {
    "title": "Event",
    "description": "An event of the stream. "
    "The first one has only an id, with which a stream can go on.",
    "type": "object",
    "properties": {
        "id": {
            "type": "string",
            "description": "What a client sends as Last-Event-ID when it comes back.",
        },
        "event": {"enum": ["run", "task", "node", "reload"]},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "description": "The row as it is now, as the lists have it. `reload` has none.",
        },
    },
    "required": ["id"],
}


@events.get(
    "/events",
    response_class=Response,
    responses={
        200: {
            "description": "A stream of these events.",
            "content": {"text/event-stream": {"schema": EVENT}},
        }
    },
)
async def stream_events(
    request: Request,
    operations: Viewer,
    topic: Annotated[list[Topic], Query(min_length=1, max_length=20)],
    last_event_id: Annotated[str | None, Header(max_length=100, pattern=r"^[ -~]*$")] = None,
) -> Response:
    """Changes in these topics, as server-sent events `run`, `task` and `node`, whose data is JSON;
    or `reload`.
    """
    guard = guard_of(request)
    if guard.feed.stopping.is_set():
        raise Refused(503, "the service is stopping")
    owner = operations.actor.token or operations.actor.name
    return EventStream(request, frozenset(topic), owner, last_event_id)
