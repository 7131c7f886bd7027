"""Backups in a bucket, by the S3 protocol. Only this module uses obstore, which the extra `s3`
installs.

An object appears in the bucket only when its upload is complete, so an interrupted upload leaves no
part of a backup. The text of an error of obstore is never passed on unchanged, because it may hold
URLs with signatures.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from batch_system.backup.file.digest import sha256
from batch_system.backup.file.reader import Source
from batch_system.concurrency.stoppable import Stop
from batch_system.errors import BackupError, PlaceUnreachable, UnknownBackup

if TYPE_CHECKING:  # these names exist only in the type stubs of obstore
    from obstore.store import ClientConfig, RetryConfig, S3Config

PART_BYTES = 8 * 1024 * 1024
MOST_PARTS = 9_000
"""The most parts of an upload; S3 allows 10,000."""
PIECE_BYTES = 1024 * 1024
PARTS_AT_ONCE = 3
RETRY: RetryConfig = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}
TIMEOUTS: ClientConfig = {
    "connect_timeout": timedelta(seconds=10),
    "timeout": timedelta(seconds=120),
}

VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
    "AWS_SKIP_SIGNATURE",
    "AWS_SERVER_SIDE_ENCRYPTION",
    "AWS_SSE_KMS_KEY_ID",
    "AWS_CHECKSUM_ALGORITHM",
)
"""The variables that may also be in `.env`. From the environment, obstore reads further ones."""

_KEYS = "Look at AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN."
_REACH = "Look at the network, AWS_ENDPOINT_URL and AWS_REGION, and try again."
_ADVICE = {
    "NoSuchBucket": "there is no such bucket. Make it, or look at BACKUP_URL.",
    "NoSuchKey": "there is no such backup.",
    "AccessDenied": f"these keys may not do that (AccessDenied). {_KEYS}",
    "PermanentRedirect": "the bucket is in another region. Look at AWS_REGION.",
    "AuthorizationHeaderMalformed": "the bucket is in another region. Look at AWS_REGION.",
    "RequestTimeTooSkewed": "this machine's clock is wrong by more than a quarter of an hour.",
    **{
        code: f"the store refuses the keys ({code}). {_KEYS}"
        for code in (
            "InvalidAccessKeyId",
            "SignatureDoesNotMatch",
            "InvalidToken",
            "ExpiredToken",
            "InvalidSecurity",
        )
    },
}


class Objects:
    """A place in a bucket: the objects directly below a prefix."""

    def __init__(self, url: str, settings: Mapping[str, str]) -> None:
        """`url`: s3://bucket/prefix. `settings`: the values of those VARIABLES that are set. Raises
        BackupError.
        """
        self.name = self.place = url.rstrip("/")
        bucket, _, prefix = self.name.removeprefix("s3://").partition("/")
        config = cast("S3Config", {name.lower(): value for name, value in settings.items()})
        client: ClientConfig = {**TIMEOUTS, "allow_http": _is_plain(settings)}
        with self._explained():
            self._store = S3Store(
                bucket,
                prefix=prefix or None,
                config=config,
                client_options=client,
                retry_config=RETRY,
            )

    def listed(self) -> dict[str, int]:
        """The size in bytes of each object by its name."""
        with self._explained():
            objects = obstore.list_with_delimiter(self._store)["objects"]
            return {str(entry["path"]).rsplit("/", 1)[-1]: int(entry["size"]) for entry in objects}

    def has(self, name: str) -> bool:
        return self.changed_at(name) is not None

    def changed_at(self, name: str) -> datetime | None:
        with self._explained(name):
            try:
                return obstore.head(self._store, name)["last_modified"].astimezone(UTC)
            except FileNotFoundError:
                return None

    def open(self, name: str) -> Object:
        return Object(self._store, name, f"{self.name}/{name}")

    def read(self, name: str, most: int) -> bytes:
        with self.open(name) as file:
            return file.read(0, most)

    def write(self, name: str, data: bytes) -> bool:
        if self.has(name):
            return False
        with self._explained(name):
            obstore.put(self._store, name, data, use_multipart=False)
        return True

    def put(self, source: Source, name: str, stop: Stop, tell: Callable[[int], None]) -> None:
        """Upload a backup, and compare the stored object with it. `tell` is called with the number
        of bytes read.
        """
        upload = _Upload(source, stop, tell)
        with self._explained(name):
            if source.size <= upload.part:
                obstore.put(self._store, name, b"".join(upload), use_multipart=False)
            else:
                obstore.put(
                    self._store,
                    name,
                    iter(upload),
                    chunk_size=upload.part,
                    max_concurrency=PARTS_AT_ONCE,
                )
        with self.open(name) as stored:
            if (stored.size, stored.etag) == (source.size, upload.etag()) or sha256(
                stored, stop
            ) == upload.sha256():
                return
        self.delete(name)
        raise BackupError(
            f"{self.name}/{name} is not what was sent, so it was removed again. Try again."
        )

    def delete(self, name: str) -> None:
        with self._explained(name):
            obstore.delete(self._store, name)

    @contextmanager
    def _explained(self, name: str = "") -> Iterator[None]:
        with explained(f"{self.name}/{name}" if name else self.name):
            yield


def _is_plain(settings: Mapping[str, str]) -> bool:
    """Whether the endpoint uses HTTP without TLS. Raises BackupError for values that would make
    obstore panic.
    """
    for name, value in settings.items():
        if not value.isprintable() or " " in value:
            raise BackupError(f"{name} has a space or a control character in it")
    endpoints = {
        name: settings.get(name, "") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
    }
    for name, endpoint in endpoints.items():
        if endpoint and not re.fullmatch(r"https?://[^\s/@]+(/[^\s@]*)?", endpoint):
            raise BackupError(
                f"{name} is not the endpoint of a store; allowed: https://host, or http://host:port"
            )
    return any(endpoint.startswith("http://") for endpoint in endpoints.values())


class Object:
    """A source that reads an object of a bucket by ranges."""

    def __init__(self, store: S3Store, path: str, name: str) -> None:
        self.name = name
        self._store = store
        self._path = path
        with explained(name):
            try:
                meta = obstore.head(store, path)
            except FileNotFoundError:  # only the answer to a GET says whether the bucket is missing
                meta = obstore.get(store, path).meta
        self.size = int(meta["size"])
        self.etag = str(meta["e_tag"] or "").strip('"')

    def read(self, offset: int, length: int) -> bytes:
        """These bytes, or fewer at the end of the object."""
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        with explained(self.name):
            return bytes(obstore.get_range(self._store, self._path, start=offset, length=length))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        pass


class _Upload:
    """Yields the pieces of a source, and computes their checksums."""

    def __init__(self, source: Source, stop: Stop, tell: Callable[[int], None]) -> None:
        self.part = max(PART_BYTES, -(-source.size // MOST_PARTS))
        self._source = source
        self._stop = stop
        self._tell = tell
        self._parts: list[Any] = []
        self._whole = hashlib.sha256()

    def __iter__(self) -> Iterator[bytes]:
        for start in range(0, self._source.size, self.part):
            digest = hashlib.md5(usedforsecurity=False)
            self._parts.append(digest)
            end = min(start + self.part, self._source.size)
            for offset in range(start, end, PIECE_BYTES):
                self._stop.check()
                piece = self._source.read(offset, min(PIECE_BYTES, end - offset))
                digest.update(piece)
                self._whole.update(piece)
                self._tell(offset + len(piece))
                yield piece

    def etag(self) -> str:
        """The entity tag that S3 gives to an object uploaded in these parts, unless it is encrypted
        with KMS keys.
        """
        if len(self._parts) <= 1:
            return str(self._parts[0].hexdigest()) if self._parts else ""
        joined = b"".join(part.digest() for part in self._parts)
        return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(self._parts)}"

    def sha256(self) -> str:
        return self._whole.hexdigest()


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn an error of obstore into an UnknownBackup or a PlaceUnreachable, which names the object.

    Its message contains nothing of the request, which may include secrets.
    """
    try:
        yield
    except (BaseError, OSError, ValueError) as error:
        cause = _cause(str(error))
        kind = UnknownBackup if cause.startswith("there is no such") else PlaceUnreachable
        raise kind(f"{name}: {cause}") from None


def _cause(text: str) -> str:
    code = re.search(r"<Code>(\w{1,60})</Code>", text)
    status = re.search(r"status code: (\d{3})", text)
    if code and code[1] in _ADVICE:
        return _ADVICE[code[1]]
    if status and status[1] in ("401", "403"):
        return f"the store refuses the keys (HTTP {status[1]}). {_KEYS}"
    if status and status[1] == "404":
        return "there is no such bucket or backup. Look at BACKUP_URL."
    if code or status:
        return (
            "the store refuses that "
            f"({code[1] if code else f'HTTP {status[1]}' if status else ''})."
        )
    for words, cause in (
        ("169.254.169.254", f"there are no keys for the store. {_KEYS}"),
        ("redirect", _ADVICE["PermanentRedirect"]),
        ("dns error", f"the name of its host can't be resolved. {_REACH}"),
        ("certificate", "its certificate is not trusted. Look at AWS_ENDPOINT_URL."),
        ("onnection refused", f"the connection was refused. {_REACH}"),
        ("timed out", f"it does not answer. {_REACH}"),
        ("Config error", "one of the variables AWS_… has a value that is not allowed."),
    ):
        if words in text:
            return cause
    return f"it can't be reached, or the connection was cut. {_REACH}"
