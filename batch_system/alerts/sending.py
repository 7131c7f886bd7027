"""Sends one message to one channel. If that fails, it raises NotSent, which says whether to try
again.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import ssl
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from batch_system import clock
from batch_system.alerts.channels import Channel
from batch_system.alerts.messages import Message
from batch_system.concurrency.offload import offload

# These are imported in a thread when something is sent, because that takes long and many services
# send nothing.
if TYPE_CHECKING:
    import httpx

Timeout = float | tuple[float, float, float, float]
"""Seconds: for each step, or to connect, to read, to write, and to wait for a connection."""
TIMEOUT: Timeout = (5.0, 20.0, 20.0, 20.0)
LONGEST_CALL = 60.0
"""Seconds after which a call ends, even if its answer is still arriving byte by byte."""
LONGEST_RETRY_AFTER = 3_600.0


class _HidesAddresses(logging.Filter):
    """Drops httpx's line about each call of a webhook or a ping, and hides their addresses, which
    contain secrets.
    """

    def __init__(self) -> None:
        super().__init__()
        self.addresses: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            if record.levelno <= logging.INFO and any(
                str(arg) in self.addresses for arg in record.args
            ):
                return False
            record.args = tuple("***" if str(arg) in self.addresses else arg for arg in record.args)
        return True


_hides = _HidesAddresses()
logging.getLogger("httpx").addFilter(_hides)


async def open_client(timeout: Timeout) -> httpx.AsyncClient:
    """A client that follows no redirect. The authorities that it trusts are read once per process,
    in a thread.
    """
    return await offload(_client, timeout)


def _client(timeout: Timeout) -> httpx.AsyncClient:
    import httpx

    return httpx.AsyncClient(verify=_trusted(), timeout=timeout, follow_redirects=False)


@cache
def _trusted() -> ssl.SSLContext:
    import httpx

    return httpx.create_ssl_context()


def hide(address: str) -> None:
    """Show this address in no line of the log. Call it after a client was opened."""
    import httpx

    _hides.addresses |= {address, str(httpx.URL(address))}


class NotSent(Exception):
    """A message could not be sent. `wait`: the seconds after which the receiver wants another try,
    if it says so.
    """

    def __init__(self, reason: str, wait: float | None = None, is_final: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait
        self.is_final = is_final


async def post(
    channel: Channel, secret: str | None, message: str, notes: Sequence[dict[str, Any]]
) -> None:
    """Post notes as JSON to the webhook, with a signature by Standard Webhooks. Raises NotSent."""
    body = json.dumps({"id": message, "events": list(notes)}, ensure_ascii=False).encode()
    headers = {
        "content-type": "application/json",
        **signature(secret, message, int(clock.now().timestamp()), body),
    }
    async with await open_client(TIMEOUT) as client:
        from httpx import HTTPError

        hide(channel.url)
        try:
            async with (
                asyncio.timeout(LONGEST_CALL),
                client.stream("POST", channel.url, content=body, headers=headers) as answer,
            ):
                status, retry_after = answer.status_code, answer.headers.get("retry-after")
        except (HTTPError, TimeoutError) as error:
            raise NotSent(f"no answer ({type(error).__name__})") from None
    if not 200 <= status < 300:
        raise NotSent(
            f"the answer was {status}", wait=_seconds(retry_after), is_final=status == 410
        )


def signature(secret: str | None, message: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers of Standard Webhooks: HMAC-SHA256 over the id, the time and the body. Without a
    secret there is no signature.

    `secret`: `whsec_` and base64, or any other text, whose UTF-8 is the key.
    """
    headers = {"webhook-id": message, "webhook-timestamp": str(timestamp)}
    if secret is not None:
        signed = f"{message}.{timestamp}.".encode() + body
        digest = hmac.new(_key(secret), signed, hashlib.sha256).digest()
        headers["webhook-signature"] = f"v1,{base64.b64encode(digest).decode()}"
    return headers


def _key(secret: str) -> bytes:
    if secret.startswith("whsec_"):
        try:
            return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except ValueError:
            pass
    return secret.encode()


def _seconds(retry_after: str | None) -> float | None:
    """The value of Retry-After if it is a number of seconds, limited to an hour."""
    if retry_after is None or not retry_after.isascii() or not retry_after.isdigit():
        return None
    return min(LONGEST_RETRY_AFTER, float(retry_after[:9]))


def _with(url: str, incident: str | None, is_good: bool) -> str:
    """The URL for a message about one incident: the service behind it identifies it by our id, and
    resolves it.
    """
    if incident is None:
        return url
    action = "&action=resolve" if is_good else ""
    return f"{url}{'&' if '?' in url else '?'}dedup={incident}{action}"


def notify(channel: Channel, message: Message, is_good: bool, incident: str | None = None) -> None:
    """Send a message for people by Apprise. It blocks, so call it in a thread. Raises NotSent.

    `incident`: its id, for a channel that keeps incidents.
    """
    from apprise import Apprise, NotifyFormat, NotifyType

    if (apprise_logger := logging.getLogger("apprise")).level == logging.NOTSET:
        apprise_logger.setLevel(logging.WARNING)  # its lines would name the receivers
    apprise = Apprise()
    if not apprise.add(_with(channel.url, incident, is_good)):
        raise NotSent("Apprise can't read the URL", is_final=True)
    kind = NotifyType.SUCCESS if is_good else NotifyType.FAILURE
    if not apprise.notify(
        message.body, title=message.title, notify_type=kind, body_format=NotifyFormat.TEXT
    ):
        raise NotSent("Apprise could not send it: the receiver did not answer, or has refused it")
