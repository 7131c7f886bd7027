"""What BACKUP_URL may be: the address of a bucket, or of a folder that is not BACKUP_DIR."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote_to_bytes

from service.errors import InvalidSetting

FILE = "file://"


def place_url(url: str) -> str:
    """The address without a slash at its end. Raises ValueError, without the value: it may hold a password."""
    scheme, found, rest = url.partition("://")
    if not found or scheme not in ("s3", "file") or not rest.strip("/"):
        raise ValueError("not a place for backups; allowed: s3://bucket/prefix or file:///folder")
    if scheme == "file":
        folder_of(url)
    elif any(mark in rest for mark in "@?#"):
        raise ValueError(
            "only a bucket and a prefix may stand in s3://bucket/prefix; keys, the endpoint and the region are read "
            "from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL and AWS_REGION"
        )
    return url.rstrip("/")


def folder_of(url: str) -> Path:
    """The folder that a file URL names: a whole path, in which %20 is a space. Raises ValueError, without the value."""
    host, slash, rest = url.removeprefix(FILE).partition("/")
    if host or not slash:
        raise ValueError("not the address of a folder: it begins with three slashes; allowed: file:///folder")
    path = os.fsdecode(unquote_to_bytes(f"/{rest}"))
    if "?" in rest or "#" in rest or not path.isprintable():
        raise ValueError("not the address of a folder: ? is written as %3F there, # as %23; allowed: file:///folder")
    return Path(path)


def refuse_one_place(folder: Path, url: str) -> None:
    """Raises InvalidSetting where BACKUP_URL is BACKUP_DIR itself, by whatever name or link."""
    if not url.startswith(FILE):
        return
    other = folder_of(url)
    is_one = os.path.realpath(folder) == os.path.realpath(other)
    if not is_one:
        with suppress(OSError):  # one of them is not there
            is_one = os.path.samefile(folder, other)
    if is_one:
        raise InvalidSetting(
            f"setting BACKUP_URL: it is the folder of BACKUP_DIR ({folder}), and a copy there would be the backup "
            "itself; allowed: another folder, or s3://bucket/prefix"
        )
