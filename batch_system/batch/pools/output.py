"""The output of a child and its own children on stdout and stderr, as lines. Apart from child.py,
because it knows only a pipe, and no run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from batch_system import clock
from batch_system.logs.log_lines import LONGEST_LINE

CHUNK = 16_000
SHARE = 3
"""Reading pauses for this many times the duration of the last piece, so that one child leaves the
event loop to others.
"""


class Lines:
    """Cuts bytes into lines. A line is cut at LONGEST_LINE, and its rest is left out."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._left_out = 0

    def feed(self, data: bytes) -> Iterator[str]:
        """The lines that end in `data`, without the empty ones."""
        *ended, rest = data.split(b"\n")
        for part in ended:
            self._add(part)
            yield from self.rest()
        self._add(rest)

    def rest(self) -> Iterator[str]:
        """The line that has not ended, if there is one."""
        text, left_out = self._line.decode("utf-8", "replace").rstrip("\r"), self._left_out
        self._line.clear()
        self._left_out = 0
        if text.strip():
            yield f"{text}... (cut: {left_out:,} more bytes)" if left_out else text

    def _add(self, part: bytes) -> None:
        fits = LONGEST_LINE - len(self._line)
        self._line += part[:fits]
        self._left_out += max(0, len(part) - fits)


async def copy_lines(descriptor: int, tell: Callable[[str], None]) -> None:
    """Call `tell` with each line from the pipe until all its writers have closed it. It closes the
    descriptor.
    """
    reader, lines = asyncio.StreamReader(limit=CHUNK), Lines()
    loop = asyncio.get_running_loop()
    # A pipe that is open already; the transport closes it.
    pipe = open(descriptor, "rb", 0)  # noqa: SIM115, ASYNC230
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    try:
        while data := await reader.read(CHUNK):
            began = clock.monotonic()
            for line in lines.feed(data):
                tell(line)
            await give_way(began)
    finally:
        transport.close()
        for line in lines.rest():
            tell(line)


async def give_way(began: float) -> None:
    """Wait SHARE times the duration since `began` (monotonic time)."""
    await asyncio.sleep(SHARE * (clock.monotonic() - began))
