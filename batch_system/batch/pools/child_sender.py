"""What a child sends to its service: lines, progress and messages. A thread sends them in order."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

from batch_system import clock
from batch_system.batch.context.progress import ProgressMeter
from batch_system.batch.pools import frames
from batch_system.logs import log_lines
from batch_system.logs.mode import stamp_now
from batch_system.logs.relay import Line, told

LINES_SECONDS = 0.1
"""How often lines are sent, in seconds. The first one after a pause is sent at once."""
PROGRESS_SECONDS = 0.5
"""How often progress is sent, in seconds."""
MOST_LINES, MOST_BYTES = 10_000, 4_000_000
"""The most lines, and bytes of lines, that wait to be sent. Further lines are dropped, and their
number is logged.
"""
LARGEST_LINE = 4 * log_lines.LONGEST_LINE
PART_BYTES = 64_000
"""Lines are sent in frames of about this size."""


class ChildSender:
    """Collects and sends. Any thread may add to it; `start` starts the sending thread."""

    def __init__(self, connection: socket.socket) -> None:
        self.meter: ProgressMeter | None = None
        self._connection = connection
        self._lock = threading.Lock()
        self._lines: list[bytes] = []
        self._messages: list[bytes] = []
        self._size = self._lost = self._refused = 0
        self._progress_at = 0.0
        self._wake = threading.Event()
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="batch-sender", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add_line(self, line: Line) -> None:
        """Add a log line, or count it as lost if too many wait."""
        encoded = json.dumps(line, default=str).encode()
        if len(encoded) > LARGEST_LINE:
            text = (
                log_lines.line(line["event"]) if isinstance(line["event"], dict) else line["event"]
            )
            short = told(
                line["at"],
                line["level"],
                line["logger"],
                log_lines.bounded(text, log_lines.LONGEST_LINE),
            )
            encoded = json.dumps(short).encode()
        with self._lock:
            if len(self._lines) < MOST_LINES and self._size < MOST_BYTES:
                self._lines.append(encoded)
                self._size += len(encoded)
            else:
                self._lost += 1
        self._wake.set()

    def send(self, message: dict[str, Any]) -> None:
        """Send a message at once, after the lines before it. Raises BrokenFrame if it is too
        large.
        """
        encoded = frames.encoded(message)
        with self._lock:
            self._messages.append(encoded)
        self._wake.set()

    def count_refused(self) -> None:
        """Count a write of the run that was refused."""
        with self._lock:
            self._refused += 1
        self._wake.set()

    def finish(self, message: dict[str, Any], seconds: float) -> None:
        """Send everything and then `message`, within `seconds`."""
        encoded = frames.encoded(message)
        with self._lock:
            self._messages.append(encoded)
            self._is_ending.set()
        self._wake.set()
        self._thread.join(seconds)

    def _serve(self) -> None:
        is_over = False
        while not is_over:
            self._wake.wait(PROGRESS_SECONDS)
            self._wake.clear()
            try:
                is_over = self._flush()
            except MemoryError:  # the code of the run has used up its bound
                continue
            except OSError:  # the service has ended, and this process will be killed
                return
            if not self._messages:
                self._is_ending.wait(LINES_SECONDS)

    def _flush(self) -> bool:
        """Send everything that waits. Returns whether nothing will follow."""
        with self._lock:
            is_over = self._is_ending.is_set()
            lines = self._lines
            self._lines = []
            self._size = 0
            messages = self._messages
            self._messages = []
            lost = self._lost
            self._lost = 0
            refused = self._refused
            self._refused = 0
        if lost:
            text = f"{lost:,} lines were dropped: they came faster than they could be sent"
            lines.append(
                json.dumps(told(stamp_now(), "warning", "batch_system.batch", text)).encode()
            )
        for part in _parts(lines):
            self._connection.sendall(frames.framed(b'{"lines":[' + b",".join(part) + b"]}"))
        if refused:
            self._connection.sendall(frames.encoded({"refused": refused}))
        self._send_progress(is_over)
        for message in messages:
            self._connection.sendall(message)
        return is_over

    def _send_progress(self, is_over: bool) -> None:
        now = clock.monotonic()
        if self.meter is None or not (is_over or now >= self._progress_at + PROGRESS_SECONDS):
            return
        if (progress := self.meter.take()) is not None:
            self._progress_at = now
            values = [progress.done, progress.total, progress.message or "", progress.before]
            self._connection.sendall(frames.encoded({"progress": values}))


def _parts(lines: list[bytes]) -> list[list[bytes]]:
    """The lines in parts of about PART_BYTES."""
    parts: list[list[bytes]] = []
    size = PART_BYTES
    for line in lines:
        if size >= PART_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(line)
        size += len(line)
    return parts
