"""An S3 server for tests: moto's, in a thread of this process; and a network before it that can be
cut.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

KEY, SECRET = "AKIATESTS", "a-secret/that+nobody=may-see"
_numbers = count(1)


@dataclass(frozen=True)
class Bucket:
    """An empty bucket. `settings`: environment variables for access to it; `url`: a prefix in
    it.
    """

    name: str
    port: int
    client: Any

    @property
    def url(self) -> str:
        return f"s3://{self.name}/shop/db"

    @property
    def settings(self) -> dict[str, str]:
        return {**keys(f"http://127.0.0.1:{self.port}"), "BACKUP_URL": self.url}

    def keys(self) -> list[str]:
        return [
            found["Key"]
            for found in self.client.list_objects_v2(Bucket=self.name).get("Contents", [])
        ]

    def uploads(self) -> list[str]:
        """The keys of multipart uploads that have begun and have not ended."""
        return [
            found["Key"]
            for found in self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", [])
        ]

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)


def keys(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }


@pytest.fixture(scope="session")
def s3_server() -> Iterator[ThreadedMotoServer]:
    logging.getLogger("werkzeug").disabled = True  # tests compare the stderr of commands
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def bucket(s3_server: ThreadedMotoServer, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket, to which BACKUP_URL is set."""
    _, port = s3_server.get_host_and_port()
    endpoint = f"http://127.0.0.1:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
    )
    made = Bucket(f"backups-{next(_numbers)}", port, client)
    client.create_bucket(Bucket=made.name)
    for name, value in made.settings.items():
        monkeypatch.setenv(name, value)
    return made


def close(listening: socket.socket) -> None:
    """Close a socket that a thread may be waiting on, which would keep the port open."""
    with suppress(OSError):  # macOS shuts no such socket down, but ends the wait
        listening.shutdown(socket.SHUT_RDWR)
    listening.close()


class Network:
    """Forwards bytes to a port until it is cut, by the test or after a number of bytes from the
    client.
    """

    def __init__(self, port: int, cut_after: int) -> None:
        self._to, self._left = port, cut_after
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        close(self._listening)

    @property
    def is_cut(self) -> bool:
        return self._left <= 0

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                if self.is_cut:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._to))
                threading.Thread(
                    target=self._pass, args=(client, server, True), daemon=True
                ).start()
                threading.Thread(
                    target=self._pass, args=(server, client, False), daemon=True
                ).start()

    def _pass(self, source: socket.socket, target: socket.socket, is_counted: bool) -> None:
        with suppress(OSError):
            while (data := source.recv(65_536)) and not self.is_cut:
                target.sendall(data)
                if is_counted:
                    with self._lock:
                        self._left -= len(data)
        for end in (target, source):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()


@contextmanager
def network(port: int, cut_after: int) -> Iterator[Network]:
    made = Network(port, cut_after)
    try:
        yield made
    finally:
        made.close()


REFUSAL = """<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>{code}</Code><Message>{message}</Message><AWSAccessKeyId>{key}</AWSAccessKeyId>
<StringToSign>AWS4-HMAC-SHA256 {secret}</StringToSign></Error>"""


@contextmanager
def refusing(status: int, code: str) -> Iterator[int]:
    """The port of a server that answers every request with this error, which contains secrets."""
    body = REFUSAL.format(code=code, message=f"not with {KEY}", key=KEY, secret=SECRET).encode()
    answer = (
        b"HTTP/1.1 %d No\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nConnection: "
        b"close\r\n\r\n"
    )
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = listening.accept()
                with client, suppress(OSError):
                    client.recv(65_536)
                    client.sendall(answer % (status, len(body)) + body)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listening.getsockname()[1]
    finally:
        close(listening)
