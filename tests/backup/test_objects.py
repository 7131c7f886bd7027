"""Backups in a bucket: real requests to a real S3 server, whole, cut, refused and killed."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from batch_system.backup.file.reader import LocalFile
from batch_system.backup.places import s3
from batch_system.backup.places.place import nothing
from batch_system.backup.places.s3 import Objects
from batch_system.concurrency.stoppable import Stop, Stopped
from batch_system.errors import BackupError
from tests.backup.s3 import SECRET, Bucket, bucket, keys, network, refusing, s3_server

__all__ = ["bucket", "s3_server"]

NAME = "backup_20261125_020000.backup.gz"
MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts as small as S3 allows, and short waits before a retry."""
    monkeypatch.setattr(s3, "PART_BYTES", 5 * MIB)
    quick = {"init_backoff": timedelta(milliseconds=10), "max_backoff": timedelta(milliseconds=50)}
    monkeypatch.setattr(
        s3, "RETRY", {"max_retries": 2, "retry_timeout": timedelta(seconds=5), "backoff": quick}
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backup of a little more than two parts."""
    path = tmp_path_factory.mktemp("large") / NAME
    path.write_bytes(os.urandom(MIB) * 11)
    return path


def store(bucket: Bucket, port: int | None = None) -> Objects:
    return Objects(bucket.url, keys(f"http://127.0.0.1:{port or bucket.port}"))


def put(storage: Objects, path: Path, stop: Stop | None = None) -> None:
    with LocalFile(path) as source:
        storage.put(source, path.name, stop or Stop(), nothing)


def test_a_large_file_goes_up_in_parts_and_comes_back_by_ranges(
    bucket: Bucket, large: Path
) -> None:
    storage, told = store(bucket), []
    with LocalFile(large) as source:
        storage.put(source, NAME, Stop(), told.append)
    assert bucket.keys() == [f"shop/db/{NAME}"] and bucket.uploads() == []
    assert bucket.client.head_object(Bucket=bucket.name, Key=f"shop/db/{NAME}")["ETag"].endswith(
        '-3"'
    )
    assert told == sorted(told) and told[-1] == large.stat().st_size
    assert storage.listed() == {NAME: large.stat().st_size}
    data = large.read_bytes()
    with storage.open(NAME) as source:
        assert (source.name, source.size) == (f"{bucket.url}/{NAME}", len(data))
        assert source.read(7 * MIB - 3, 10) == data[7 * MIB - 3 : 7 * MIB + 7]
        assert source.read(len(data) - 5, 100) == data[-5:] and source.read(len(data), 1) == b""


def test_a_small_file_goes_up_as_one_and_can_be_deleted(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"small")
    storage = store(bucket)
    put(storage, tmp_path / NAME)
    bucket.put("shop/db/deeper/notes.txt", b"of somebody else")
    assert storage.listed() == {NAME: 5}
    bucket.put("shop/db/empty", b"")
    with storage.open("empty") as source:
        assert source.size == 0 and source.read(0, 10) == b""
    storage.delete("empty")
    storage.delete(NAME)
    assert bucket.keys() == ["shop/db/deeper/notes.txt"]


def test_an_object_whose_etag_is_no_checksum_is_read_back(
    bucket: Bucket, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3._Upload, "etag", lambda self: "of-an-encrypted-object")
    put(store(bucket), large)
    assert bucket.keys() == [f"shop/db/{NAME}"]


def test_an_object_that_differs_from_the_upload_is_removed_and_reported(
    bucket: Bucket, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checksums of the upload are of other bytes than the stored object, as if the file changed
    meanwhile.
    """
    monkeypatch.setattr(s3._Upload, "etag", lambda self: "other")
    monkeypatch.setattr(s3._Upload, "sha256", lambda self: hashlib.sha256(b"other").hexdigest())
    with pytest.raises(
        BackupError, match=rf"{bucket.url}/{NAME} is not what was sent, so it was removed again"
    ):
        put(store(bucket), large)
    assert bucket.keys() == []


def test_an_upload_that_loses_its_connection_leaves_no_object_and_the_next_one_starts_anew(
    bucket: Bucket, large: Path
) -> None:
    with network(bucket.port, cut_after=6 * MIB) as between:
        with pytest.raises(
            BackupError, match=rf"^{bucket.url}/{NAME}: .* the connection was cut"
        ) as caught:
            put(store(bucket, between.port), large)
        assert between.is_cut
    assert SECRET not in str(caught.value) and "127.0.0.1" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert bucket.keys() == []
    put(store(bucket), large)
    assert bucket.keys() == [f"shop/db/{NAME}"]


def test_an_upload_that_is_stopped_leaves_neither_an_object_nor_parts(
    bucket: Bucket, large: Path
) -> None:
    stop = Stop()

    def tell(done: int) -> None:
        if done > 6 * MIB:
            stop.request()

    with pytest.raises(Stopped), LocalFile(large) as source:
        store(bucket).put(source, NAME, stop, tell)
    assert bucket.keys() == [] and bucket.uploads() == []


UPLOAD = """
import os
import sys
from pathlib import Path
from batch_system.backup.places import s3
from batch_system.backup.file.reader import LocalFile
from batch_system.concurrency.stoppable import Stop
s3.PART_BYTES = 5 * 1024 * 1024

def tell(done):
    if done > 10_000_000:
        print("sent", flush=True)
        sys.stdin.read()

path = Path(sys.argv[1])
settings = {name: os.environ[name] for name in s3.VARIABLES if name in os.environ}
s3.Objects(sys.argv[2], settings).put(LocalFile(path), path.name, Stop(), tell)
"""


def test_an_upload_that_is_killed_leaves_no_object_and_the_next_one_is_whole(
    bucket: Bucket, large: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", UPLOAD, str(large), bucket.url],
        env={**os.environ, **bucket.settings, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"sent\n"
        process.send_signal(signal.SIGKILL)
    assert bucket.keys() == [] and bucket.uploads() == [f"shop/db/{NAME}"]
    put(store(bucket), large)
    assert bucket.keys() == [f"shop/db/{NAME}"]


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (
            403,
            "InvalidAccessKeyId",
            "refuses the keys (InvalidAccessKeyId). Look at AWS_ACCESS_KEY_ID",
        ),
        (403, "SignatureDoesNotMatch", "refuses the keys (SignatureDoesNotMatch)"),
        (403, "AccessDenied", "these keys may not do that"),
        (301, "PermanentRedirect", "another region. Look at AWS_REGION"),
        (400, "SomethingElse", "the store refuses that (SomethingElse)."),
    ],
)
def test_an_error_of_the_store_is_reported_without_the_text_of_its_answer(
    bucket: Bucket, large: Path, status: int, code: str, told: str
) -> None:
    with refusing(status, code) as port:
        for attempt in (
            lambda: put(store(bucket, port), large),
            lambda: store(bucket, port).listed(),
        ):
            with pytest.raises(BackupError) as caught:
                attempt()
            message = str(caught.value)
            assert message.startswith(bucket.url) and told in message and "\n" not in message
            assert SECRET not in message and "AKIA" not in message


def test_a_missing_bucket_is_named(bucket: Bucket, large: Path) -> None:
    storage = Objects("s3://never-made/shop", keys(f"http://127.0.0.1:{bucket.port}"))
    for attempt in (lambda: put(storage, large), storage.listed, lambda: storage.open(NAME)):
        with pytest.raises(
            BackupError,
            match=r"s3://never-made/shop.*: there is no such bucket\. Make it, or look at BAC",
        ):
            attempt()
    with pytest.raises(BackupError, match=rf"{bucket.url}/{NAME}: there is no such backup"):
        store(bucket).open(NAME)


def test_a_refused_connection_is_reported(bucket: Bucket, large: Path) -> None:
    with network(bucket.port, cut_after=0) as between:
        port = between.port
    with pytest.raises(
        BackupError, match=r"the connection was refused\. Look at the network, AWS_ENDPOINT_URL"
    ):
        store(bucket, port).listed()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        (
            "AWS_ENDPOINT_URL",
            "minio:9000",
            "AWS_ENDPOINT_URL is not the endpoint of a store; allowed: https:",
        ),
        (
            "AWS_ENDPOINT_URL",
            f"http://bob:{SECRET}@host",
            "AWS_ENDPOINT_URL is not the endpoint of a store",
        ),
        (
            "AWS_ACCESS_KEY_ID",
            f"{SECRET}\n",
            "AWS_ACCESS_KEY_ID has a space or a control character in it",
        ),
        (
            "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
            SECRET,
            "one of the variables AWS_… has a value that is not allowed",
        ),
    ],
)
def test_an_invalid_variable_is_named_without_its_value(name: str, value: str, told: str) -> None:
    with pytest.raises(BackupError) as caught:
        Objects("s3://bucket/shop", {**keys("http://127.0.0.1:1"), name: value})
    assert told in caught.value.message and SECRET not in caught.value.message


def test_several_threads_may_read_one_object(bucket: Bucket, large: Path) -> None:
    bucket.put(f"shop/db/{NAME}", data := large.read_bytes())
    found: dict[int, bytes] = {}
    with store(bucket).open(NAME) as source:
        threads = [
            threading.Thread(target=lambda at=at: found.update({at: source.read(at * MIB, MIB)}))
            for at in range(11)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert b"".join(found[at] for at in range(11)) == data
