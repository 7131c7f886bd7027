"""Checks the setting BACKUP_URL: the URL of a bucket, or of a folder other than BACKUP_DIR."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote_to_bytes

from pydantic import AfterValidator

from service.errors import InvalidSetting

FILE = "file://"


def place_url(url: str) -> str:
    """The URL without a final slash. Raises ValueError without the value, which may contain a
    password.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("s3", "file") or not rest.strip("/"):
        raise ValueError(
            "not the URL of a place for backups; allowed: s3://bucket/prefix or file:///folder"
        )
    if scheme == "file":
        folder_of(url)
    elif any(mark in rest for mark in "@?#"):
        raise ValueError(
            "s3://bucket/prefix may have only a bucket and a prefix; keys, the endpoint and the "
            "region are read "
            "from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL and AWS_REGION"
        )
    return url.rstrip("/")


def folder_of(url: str) -> Path:
    """The folder of a file URL: an absolute path, percent-decoded. Raises ValueError without the
    value.
    """
    host, slash, rest = url.removeprefix(FILE).partition("/")
    if host or not slash:
        raise ValueError(
            "not the URL of a folder, which begins with three slashes; allowed: file:///folder"
        )
    path = os.fsdecode(unquote_to_bytes(f"/{rest}"))
    if "?" in rest or "#" in rest or not path.isprintable():
        raise ValueError(
            "not the URL of a folder: write ? as %3F and # as %23; allowed: file:///folder"
        )
    return Path(path)


def refuse_one_place(folder: Path, url: str) -> None:
    """Raise InvalidSetting if `url` is the folder BACKUP_DIR itself, also by another name or
    through a link.
    """
    if not url.startswith(FILE):
        return
    other = folder_of(url)
    is_same = os.path.realpath(folder) == os.path.realpath(other)
    if not is_same:
        with suppress(OSError):  # one of the folders does not exist
            is_same = os.path.samefile(folder, other)
    if is_same:
        raise InvalidSetting(
            f"setting BACKUP_URL: it is the folder of BACKUP_DIR ({folder}), and a copy there "
            "would be the backup "
            "itself; allowed: another folder, or s3://bucket/prefix"
        )


PlaceUrl = Annotated[str, AfterValidator(place_url)]
