"""What a killed upload left in a bucket: parts that nobody sees, and that cost until somebody ends their upload.

The library that uploads can't list them, so two requests are signed here. They need keys of their own: where a role of
the machine's or a file of AWS's has them, a lifecycle rule of the bucket does this (docs/backups.md).
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from html import unescape
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import PurePosixPath
from urllib.parse import quote, urlsplit

from service.backup.folder import ABANDONED_AFTER, NAME
from service.logs import get_logger

logger = get_logger(__name__)

SECONDS = 10.0
MOST_BYTES = 1024 * 1024
NOTHING = hashlib.sha256(b"").hexdigest()


def end_abandoned(url: str, settings: Mapping[str, str], now: datetime) -> int:
    """End the uploads of backups below `url` that were begun more than a day ago; returns how many they were.

    `settings`: the variables AWS_…. A store that refuses it is told in the log, and asked again with the next upload.
    """
    keys = (settings.get("AWS_ACCESS_KEY_ID"), settings.get("AWS_SECRET_ACCESS_KEY"))
    if not all(keys) or settings.get("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "").lower() in ("true", "1", "yes"):
        return 0
    store = _Store(url, settings, now)
    ended = 0
    try:
        for key, upload in list(store.abandoned()):
            store.end(key, upload)
            ended += 1
    except (OSError, HTTPException, ValueError, TypeError):  # its text may hold what was sent
        logger.info(f"what killed uploads have left in {url} could not be looked for")
    return ended


class _Store:
    """A bucket by requests of its own, at one instant."""

    def __init__(self, url: str, settings: Mapping[str, str], now: datetime) -> None:
        bucket, _, self._prefix = url.removeprefix("s3://").rstrip("/").partition("/")
        self._region = settings.get("AWS_REGION") or settings.get("AWS_DEFAULT_REGION") or "us-east-1"
        own = settings.get("AWS_ENDPOINT_URL_S3") or settings.get("AWS_ENDPOINT_URL")
        self._endpoint = urlsplit(own or f"https://s3.{self._region}.amazonaws.com")
        self._path = f"{self._endpoint.path.rstrip('/')}/{bucket}"
        self._settings = settings
        self._now = now

    def abandoned(self) -> Iterator[tuple[str, str]]:
        """Keys and ids of uploads. Only what a backup is called, right below the prefix."""
        before = f"{self._prefix}/" if self._prefix else ""
        text = self._answer("GET", self._path, {"prefix": f"{before}backup_", "uploads": ""})
        for block in re.findall(r"<Upload>(.*?)</Upload>", text, re.DOTALL):
            key, upload, begun = (unescape(_tag(block, name)) for name in ("Key", "UploadId", "Initiated"))
            is_ours = NAME.fullmatch(PurePosixPath(key).name) and key == before + PurePosixPath(key).name
            if is_ours and self._now - datetime.fromisoformat(begun) > ABANDONED_AFTER:
                yield key, upload

    def end(self, key: str, upload: str) -> None:
        self._answer("DELETE", f"{self._path}/{quote(key)}", {"uploadId": upload})

    def _answer(self, method: str, path: str, query: dict[str, str]) -> str:
        """Raises OSError for what is no success."""
        host = self._endpoint.netloc
        secure = self._endpoint.scheme == "https"
        connection = HTTPSConnection(host, timeout=SECONDS) if secure else HTTPConnection(host, timeout=SECONDS)
        asked = "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in sorted(query.items()))
        try:
            connection.request(method, f"{path}?{asked}", headers=self._signed(method, path, asked, host))
            response = connection.getresponse()
            if response.status >= 300:
                raise OSError(f"HTTP {response.status}")
            return response.read(MOST_BYTES).decode()
        finally:
            connection.close()

    def _signed(self, method: str, path: str, query: str, host: str) -> dict[str, str]:
        """The headers of AWS's Signature Version 4."""
        at = f"{self._now:%Y%m%dT%H%M%SZ}"
        headers = {"host": host, "x-amz-content-sha256": NOTHING, "x-amz-date": at}
        if token := self._settings.get("AWS_SESSION_TOKEN"):
            headers["x-amz-security-token"] = token
        names = ";".join(sorted(headers))
        lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
        canonical = f"{method}\n{path}\n{query}\n{lines}\n{names}\n{NOTHING}"
        scope = f"{self._now:%Y%m%d}/{self._region}/s3/aws4_request"
        text = "\n".join(("AWS4-HMAC-SHA256", at, scope, hashlib.sha256(canonical.encode()).hexdigest()))
        key = f"AWS4{self._settings['AWS_SECRET_ACCESS_KEY']}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        signature = hmac.digest(key, text.encode(), "sha256").hex()
        credential = f"{self._settings['AWS_ACCESS_KEY_ID']}/{scope}"
        told = f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders={names}, Signature={signature}"
        return {**headers, "authorization": told}


def _tag(block: str, name: str) -> str:
    found = re.search(rf"<{name}>(.*?)</{name}>", block, re.DOTALL)
    if found is None:
        raise ValueError(f"no {name}")
    return found[1]
