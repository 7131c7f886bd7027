"""Real receivers of messages: an HTTP server that answers what it is told to, and a mail server."""

from __future__ import annotations

import asyncio
import email
import email.policy
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiosmtpd.smtp import SMTP


@dataclass
class Request:
    """A request as it came. `headers`: by their names in small letters."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class HttpReceiver:
    """`answers`: the status lines of the next answers; the last stays. "hang" answers nothing,
    "drip" byte by byte.
    """

    answers: list[str] = field(default_factory=lambda: ["204 No Content"])
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.rstrip().split("\r\n")
            headers = {
                name.lower(): value for name, value in (line.split(": ", 1) for line in lines)
            }
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            self.requests.append(Request(first.split()[1], headers, body))
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            if answer == "hang":
                await asyncio.Event().wait()
            if answer == "drip":
                await drip(writer)
            writer.write(
                f"HTTP/1.1 {answer}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
            )
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


async def drip(writer: asyncio.StreamWriter) -> None:
    """An answer of which something arrives again and again, and that never ends."""
    writer.write(b"HTTP/1.1 204 No Content\r\nX-Long: ")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.01)


@asynccontextmanager
async def http_receiver(*answers: str) -> AsyncIterator[HttpReceiver]:
    """An HTTP server that gives these answers, such as "429 Too Many Requests\\r\\nRetry-After:
    30".
    """
    receiver = HttpReceiver(list(answers) or ["204 No Content"])
    handlers: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        await receiver.handle(reader, writer)
        handlers.discard(task)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    receiver.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"
    try:
        yield receiver
    finally:
        server.close()
        for task in handlers:
            task.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)


@dataclass
class Mail:
    to: str
    subject: str
    text: str


@dataclass
class Mailbox:
    mails: list[Mail] = field(default_factory=list)
    url: str = ""

    # Named by aiosmtpd.
    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        message = email.message_from_bytes(envelope.content, policy=email.policy.default)
        body = message.get_body(("plain",))
        text = body.get_content() if body is not None else ""
        self.mails.append(Mail(envelope.rcpt_tos[0], str(message["subject"]), text))
        return "250 OK"


@asynccontextmanager
async def mailbox() -> AsyncIterator[Mailbox]:
    """A mail server. `url` is the URL by which Apprise sends to it."""
    box = Mailbox()
    server = await asyncio.get_running_loop().create_server(lambda: SMTP(box), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    box.url = (
        f"mailto://127.0.0.1:{port}?from=batch@example.com&to=oncall@example.com&mode=insecure"
    )
    try:
        yield box
    finally:
        server.close()
