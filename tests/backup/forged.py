"""Makes forged backups: files whose checksums and trailers are right, and whose content is hostile.

They are not files with changed bytes, which checksums detect, but files of somebody who knows the
format: each field of the manifest with each value of a list, members that don't fit to it, and
small files that become large.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sqlite3
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batch_system.backup.file.format import TAR_END, Trailer, padding

REVISION = "shop_0001"
"""Of no migration of ours, so that no table is made by one."""
AT = "2026-03-29T12:00:00+00:00"
CANARY = "forged_canary"
INJECTION = f'x"; CREATE TABLE {CANARY} (a int); DROP TABLE users; --'
AFTER_COMMENT = f"\n); COMMIT; CREATE TABLE public.{CANARY} (a int); --"
"""As the name that follows a type which ends with a comment: what stands between them is a part of
that.
"""
TYPE_INJECTION = f"integer --\n); CREATE TABLE {CANARY} (a int); --"
MEGABYTE = 1024 * 1024

VALUES: dict[str, str] = {
    "a statement": json.dumps(INJECTION),
    "a comment": json.dumps(TYPE_INJECTION),
    "quotes": json.dumps("'\"`[]$$\\"),
    "an end of a line": json.dumps("two\nlines\r\n"),
    "NUL": json.dumps("a\0b"),
    "a lone surrogate": r'"\ud800"',
    "control characters": json.dumps("\x1b[2J\x1b]0;title\x07\r\x9b31m\u202e\u200f\u2028"),
    "a path": json.dumps("../../../etc/passwd"),
    "a long text": json.dumps("x" * MEGABYTE),
    "empty": '""',
    "null": "null",
    "true": "true",
    "a fraction": "1.5",
    "a whole fraction": "1.0",
    "NaN": "NaN",
    "an infinity": "1e999",
    "negative": "-1",
    "10**30": "1" + "0" * 30,
    "2**63": str(2**63),
    "2**63 - 1": str(2**63 - 1),
    "5,000 digits": "9" * 5_000,
    "a number as text": '"1"',
    "an empty list": "[]",
    "an object": '{"a": {"b": []}}',
    "a list of lists": "[[1], [[2]]]",
    "the same twice": '["id", "id"]',
    "one name": '["id"]',
    "a list of statements": json.dumps([INJECTION, TYPE_INJECTION]),
    "100,000 deep": "[" * 100_000 + "]" * 100_000,
}
"""As JSON, for some can't be written by json.dumps()."""

INSTANTS: dict[str, str] = {
    "no instant": '"2026-13-99T99:99:99+00:00"',
    "an instant without an offset": '"2026-03-29T12:00:00"',
    "the last instant": '"9999-12-31T23:59:59-12:00"',
    "the first instant": '"0001-01-01T00:00:00+12:00"',
}

PATHS: dict[str, tuple[tuple[str | int, ...], ...]] = {
    "postgresql": (
        *(
            ("header", name)
            for name in ("format", "kind", "taken_at", "database", "server_version", "tool", "rows")
        ),
        *(("header", name) for name in ("revision", "revisions")),
        ("header", "revisions", "public.alembic_version"),
        *((name,) for name in ("header", "tables", "sequences", "left_out", "members")),
        *(
            ("tables", 0, name)
            for name in ("schema", "name", "folder", "columns", "types", "key", "rows", "bytes")
        ),
        *(("tables", 0, name, 0) for name in ("columns", "types", "key")),
        *(("sequences", 0, name) for name in ("schema", "name", "last_value", "is_called")),
        *(("members", 1, name) for name in ("name", "offset", "packed", "sha256", "bytes", "rows")),
        ("left_out", 0),
        ("tables", 0),
    ),
}
PATHS["sqlite"] = tuple(path for path in PATHS["postgresql"] if path[:2] != ("sequences", 0))

ROWS = b"".join(b"%d\t%d@example.org\n" % (number, number) for number in range(3))
Files = list[tuple[str, bytes]]


@dataclass(frozen=True)
class Forged:
    """A forged backup: a description of what is hostile in it, and the function that writes it."""

    what: str
    write: Callable[[Path], None]


def field_by_value(kind: str, database: Path) -> Iterator[Forged]:
    """Backups with each hostile value in each field of the manifest. (The first member has those of
    the header too.)
    """
    for path in PATHS[kind]:
        values = VALUES | (INSTANTS if path[-1] == "taken_at" else {})
        for name, value in values.items():
            yield Forged(
                f"{'.'.join(map(str, path))}: {name}",
                lambda file, path=path, value=value: _with(file, kind, database, path, value),  # type: ignore[misc]
            )


def shapes(kind: str, database: Path) -> Iterator[Forged]:
    """Backups with manifests whose fields are valid each by itself, but contradict each other."""
    manifest = _manifest(kind, database)[0]
    table = manifest["tables"][0]
    other = {**table, "name": "other", "folder": "data/0002-public.other", "rows": 0, "bytes": 0}
    if kind == "sqlite":
        other["folder"] = None
    changes: dict[str, dict[str, Any]] = {
        "a table twice": {"tables": [table, table]},
        "a folder twice": {"tables": [table, {**other, "folder": table["folder"]}]},
        "a column twice": {"tables": [{**table, "columns": ["id", "id"]}]},
        "more types than columns": {"tables": [{**table, "types": ["bigint", "text", "text"]}]},
        "more columns than types": {"tables": [{**table, "columns": ["id", "email", "c"]}]},
        "a type that ends with a comment": {
            "tables": [{**table, "columns": ["id", AFTER_COMMENT], "types": ["integer --", "text"]}]
        },
        "a sequence twice": {
            "sequences": manifest["sequences"] * 2 or [{"schema": "public", "name": "s"}] * 2
        },
        "a table of the other kind": {
            "tables": [{**table, "schema": None if table["schema"] else "public"}]
        },
        "rows beyond all numbers": {
            "tables": [{**other, "name": name, "rows": 2**63 - 1} for name in "ab"]
        },
        "no tables": {"tables": []},
        "no members": {"members": []},
        "another header": {"header": {**manifest["header"], "database": "another"}},
        "another count of rows": {"header": {**manifest["header"], "rows": 7}},
        "5,000 tables": {
            "tables": [{**other, "name": f"t{n}", "folder": _folder(kind, n)} for n in range(5_000)]
        },
    }
    for what, change in changes.items():
        yield Forged(what, lambda file, change=change: _changed(file, kind, database, change))  # type: ignore[misc]
    yield Forged("members that overlap", lambda file: _overlapping(file, kind, database))
    yield Forged("a key of the manifest twice", lambda file: _key_twice(file, kind, database))
    yield Forged("a list as manifest", lambda file: _written(file, kind, database, "[]"))
    yield Forged("half a manifest", lambda file: _written(file, kind, database, '{"header": {'))
    if kind == "postgresql":
        yield Forged("two parts with one number", _parts_with_one_number)
        yield Forged("rows with too few columns", lambda file: _rows(file, b"1\n2\n"))
        yield Forged("rows with too many columns", lambda file: _rows(file, b"1\ta\tb\tc\n"))
        yield Forged("rows that are no rows", lambda file: _rows(file, b"\\.\n\\.\n\xff\xfe\x00\n"))
        yield Forged(
            "rows that end a COPY", lambda file: _rows(file, f"\\.\n{INJECTION}\n".encode())
        )
    else:
        for what, content in databases(database).items():
            yield Forged(what, lambda file, content=content: _sqlite_file(file, database, content))  # type: ignore[misc]


def databases(database: Path) -> dict[str, bytes]:
    """Files that are not SQLite databases, or have a hostile schema, by their description."""
    sound = database.read_bytes()
    page = int.from_bytes(sound[16:18], "big")
    return {
        "no database": b"CREATE TABLE users (id int);",
        "an empty database": b"",
        "half a page": sound[: page // 2],
        "a page size of 3": sound[:16] + b"\0\3" + sound[18:],
        "a page count of 2**32 - 1": sound[:28] + b"\xff" * 4 + sound[32:],
        "a database of zeros": sound[:100] + bytes(len(sound) - 100),
        "a hostile schema": _hostile_database(),
    }


def _hostile_database() -> bytes:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute("CREATE TABLE users (id INTEGER PRIMARY KEY, email TEXT)")
        connection.execute("INSERT INTO users VALUES (1, 'a@example.org')")
        connection.execute(
            f"CREATE TRIGGER t AFTER INSERT ON users BEGIN DELETE FROM users; END /* {CANARY} */"
        )
        name = INJECTION.replace('"', '""')
        connection.execute(
            f'CREATE TABLE "{name}" (a "{TYPE_INJECTION}", "b\n--" DEFAULT (abs(1)))'
        )
        connection.execute("CREATE VIEW v AS SELECT * FROM users")
        return connection.serialize()


def bombs(kind: str, database: Path) -> dict[str, Callable[[Path], None]]:
    """Small files that could fill the memory, the disk or the screen, by their description."""

    def list_of(unit: str, size: int, name: str = "tables") -> Callable[[Path], None]:
        def text() -> str:
            return "[" + ",".join([unit] * (size // (len(unit) + 1))) + "]"

        return lambda file: _with(file, kind, database, (name,), text())

    table = _table(kind)
    empty = {**table, "rows": 0, "bytes": 0}

    def tables(count: int, columns: int = 2) -> Callable[[Path], None]:
        """Tables whose columns all have different names and types."""

        def of(number: int) -> dict[str, Any]:
            texts = [f"{number}_{column:x}" for column in range(columns)]
            more = {
                "name": f"t{number}",
                "folder": _folder(kind, number),
                "columns": texts,
                "types": texts,
            }
            return {**empty, **more, "key": []}

        return lambda file: _changed(
            file, kind, database, {"tables": [table, *map(of, range(2, count))]}
        )

    found = {
        "60 MB of objects": list_of("{}", 60_000_000),
        "60 MB of objects with a key": list_of('{"":0}', 60_000_000, "padding"),
        "60 MB of lists as members": list_of("[0]", 60_000_000, "members"),
        "60 MB of names": list_of('"ab"', 60_000_000, "left_out"),
        "60 MB in one element": lambda file: _with(
            file, kind, database, ("tables",), f'["{"a" * 60_000_000}"]'
        ),
        "60 MB of wide characters": lambda file: _with(
            file,
            kind,
            database,
            ("left_out",),
            json.dumps(["😀" + "a" * 9_000] * 6_000, ensure_ascii=False),
        ),
        "4 MB of revisions": lambda file: _with(
            file,
            kind,
            database,
            ("header", "revisions"),
            json.dumps({f"{n:x}": "" for n in range(300_000)}),
        ),
        "100,000 tables": tables(100_000),
        "23 tables with 32,000 columns": tables(23, 32_000),
        "200 tables with 32,000 columns": tables(200, 32_000),
        "290,000 members": lambda file: _many_members(file, kind, database),
        "100 MB packed, of nothing": lambda file: file.write_bytes(
            gzip.compress(bytes(100 * MEGABYTE), 9)
        ),
    }
    if kind == "postgresql":
        found["1 GB in pieces of one part"] = lambda file: _pieces_of_one_part(file, 250)
        found["2 million small rows"] = lambda file: _rows(
            file, b"".join(b"%d\t\n" % number for number in range(2_000_000))
        )
    else:
        found["2 GB of a database of zeros"] = lambda file: _zeros(file, database, 500, b"")
        found["2 GB of a database that begins as one"] = lambda file: _zeros(
            file, database, 500, database.read_bytes()
        )
    return found


def strange_files(folder: Path, name: Callable[[], str], outside: Path) -> list[Path]:
    """Make FIFOs, links and a folder with the names of backups."""
    made = [folder / name() for _ in range(7)]
    os.mkfifo(made[0])
    for path, target in zip(
        made[1:6], (outside, Path("/dev/zero"), folder / "nowhere", folder, made[0]), strict=True
    ):
        path.symlink_to(target)
    made[6].mkdir()
    return made


def sound(file: Path, kind: str, database: Path) -> Path:
    """Write a backup like the forged ones, but without anything hostile."""
    _changed(file, kind, database, {})
    return file


def make_database(path: Path) -> Path:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("CREATE TABLE users (id INTEGER PRIMARY KEY, email TEXT)")
        connection.executemany(
            "INSERT INTO users VALUES (?, ?)", [(n, f"{n}@example.org") for n in range(3)]
        )
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        connection.execute("INSERT INTO alembic_version VALUES (?)", (REVISION,))
    return path


def _folder(kind: str, number: int) -> str | None:
    return None if kind == "sqlite" else f"data/{number:04}-public.t{number}"


def _manifest(kind: str, database: Path) -> tuple[dict[str, Any], Files]:
    """A valid manifest without its members, and the files that it describes."""
    is_sqlite = kind == "sqlite"
    version_table = "alembic_version" if is_sqlite else "public.alembic_version"
    header = {
        "format": 1, "kind": kind, "taken_at": AT, "database": "app", "server_version": "18",
        "tool": "batch-system 1", "revision": REVISION, "revisions": {version_table: REVISION},
    }  # fmt: skip
    sequence = {"schema": "public", "name": "users_id_seq", "last_value": 3, "is_called": True}
    manifest = {
        "header": {**header, "rows": 3},
        "tables": [_table(kind)],
        "sequences": [] if is_sqlite else [sequence],
        "left_out": ["batch_runs"],
    }
    content = (
        ("database.sqlite3", database.read_bytes())
        if is_sqlite
        else ("data/0001-public.users/0001.copy", ROWS)
    )
    return manifest, [("header.json", json.dumps(header).encode()), content]


def _table(kind: str) -> dict[str, Any]:
    is_sqlite = kind == "sqlite"
    return {
        "schema": None if is_sqlite else "public", "name": "users",
        "folder": None if is_sqlite else "data/0001-public.users", "columns": ["id", "email"],
        "types": ["INTEGER", "TEXT"] if is_sqlite else ["bigint", "character varying(255)"],
        "key": ["id"], "rows": 3, "bytes": 0 if is_sqlite else len(ROWS),
    }  # fmt: skip


PLACE = "\ufffeplace\ufffe"


def _with(file: Path, kind: str, database: Path, path: tuple[str | int, ...], value: str) -> None:
    """Write a backup whose manifest has this JSON text at this path."""
    manifest, files = _manifest(kind, database)
    packed, members = _packed(files)
    whole = {**manifest, "members": members}
    if path[0] == "tables":  # else the sum of the rows would differ
        whole["header"]["rows"] = None
    if path[:2] == ("header", "revisions") and len(path) == 3:
        path = ("header", "revisions", next(iter(whole["header"]["revisions"])))
    text = json.dumps(_set(whole, path, PLACE), ensure_ascii=False).replace(f'"{PLACE}"', value)
    if path[0] == "header" and len(path) > 1:
        header = json.loads(files[0][1])
        first = json.dumps(_set(header, path[1:], PLACE), ensure_ascii=False).replace(
            f'"{PLACE}"', value
        )
        packed, members = _packed(
            [("header.json", first.encode("utf-8", "surrogatepass")), *files[1:]]
        )
        whole = {**manifest, "members": members}
        text = json.dumps(_set(whole, path, PLACE), ensure_ascii=False).replace(f'"{PLACE}"', value)
    _finish(file, packed, text)


def _set(whole: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    changed = deepcopy(whole)
    inner: Any = changed
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    return changed


def _changed(file: Path, kind: str, database: Path, changes: dict[str, Any]) -> None:
    manifest, files = _manifest(kind, database)
    packed, members = _packed(files)
    header = {**manifest["header"], "rows": None}
    _finish(
        file,
        packed,
        json.dumps(
            {**manifest, "header": header, "members": members, **changes}, ensure_ascii=False
        ),
    )


def _written(file: Path, kind: str, database: Path, text: str) -> None:
    _finish(file, _packed(_manifest(kind, database)[1])[0], text)


def _key_twice(file: Path, kind: str, database: Path) -> None:
    manifest, files = _manifest(kind, database)
    packed, members = _packed(files)
    text = json.dumps({**manifest, "members": members})
    _finish(file, packed, f'{text[:-1]}, "tables": []}}')


def _overlapping(file: Path, kind: str, database: Path) -> None:
    manifest, files = _manifest(kind, database)
    packed, members = _packed(files)
    again = [*members, {**members[1], "name": members[1]["name"].replace("0001.copy", "0002.copy")}]
    _finish(file, packed, json.dumps({**manifest, "members": again}))


def _parts_with_one_number(file: Path) -> None:
    manifest, files = _manifest("postgresql", Path())
    name, rows = files[1]
    _all(
        file,
        manifest,
        [*files, (name.replace("0001.copy", "00001.copy"), rows)],
        rows=6,
        size=2 * len(rows),
    )


def _rows(file: Path, rows: bytes) -> None:
    """Write a backup with these rows, in as many gzip members as they need."""
    manifest, files = _manifest("postgresql", Path())
    name, _ = files[1]
    parts = [(name, rows)]
    if len(rows) > 4 * MEGABYTE:
        lines = rows.splitlines(keepends=True)
        parts = [
            (
                name.replace("0001.copy", f"{number:04}.copy"),
                b"".join(lines[start : start + 200_000]),
            )
            for number, start in enumerate(range(0, len(lines), 200_000), 1)
        ]
    _all(file, manifest, [files[0], *parts], rows=rows.count(b"\n"), size=len(rows))


def _all(file: Path, manifest: dict[str, Any], files: Files, rows: int, size: int) -> None:
    packed, members = _packed(files)
    tables = [{**manifest["tables"][0], "rows": rows, "bytes": size}]
    header = {**manifest["header"], "rows": rows}
    _finish(
        file,
        packed,
        json.dumps({**manifest, "header": header, "tables": tables, "members": members}),
    )


def _sqlite_file(file: Path, database: Path, content: bytes) -> None:
    manifest, files = _manifest("sqlite", database)
    packed, members = _packed([files[0], ("database.sqlite3", content)])
    _finish(file, packed, json.dumps({**manifest, "members": members}))


def _pieces_of_one_part(file: Path, count: int) -> None:
    """Write a backup with one row of a gigabyte, each piece of which packs to a few kilobytes."""
    manifest, files = _manifest("postgresql", Path())
    name = files[1][0]
    size = 4 * MEGABYTE
    pieces = _repeated(name, size, count, b"x", b"\n")
    more = {"rows": 1, "bytes": size * count}
    _pieces(file, manifest, files[0], pieces, more)


def _zeros(file: Path, database: Path, count: int, start: bytes) -> None:
    manifest, files = _manifest("sqlite", database)
    pieces = _repeated("database.sqlite3", 4 * MEGABYTE, count, b"\0", b"\0", start)
    _pieces(file, manifest, files[0], pieces, {})


def _repeated(
    name: str, size: int, count: int, byte: bytes, last: bytes, start: bytes = b""
) -> list[bytes]:
    """The packed pieces of one file. All but the first and the last piece are equal."""
    first = _tar_header(name, size * count) + start + byte * (size - len(start))
    inner = gzip.compress(byte * size, 1, mtime=0)
    end = byte * (size - 1) + last + padding(size * count)
    return [
        gzip.compress(first, 1, mtime=0),
        *[inner] * (count - 2),
        gzip.compress(end, 1, mtime=0),
    ]


def _pieces(
    file: Path,
    manifest: dict[str, Any],
    header: tuple[str, bytes],
    pieces: list[bytes],
    more: dict[str, int],
) -> None:
    """Write a backup of one file in these pieces, of four megabytes each. `more`: fields of its
    table.
    """
    packed, members = _packed([header])
    name = "data/0001-public.users/0001.copy" if more else "database.sqlite3"
    place = len(packed)
    digests = {piece: hashlib.sha256(piece).hexdigest() for piece in set(pieces)}
    for number, piece in enumerate(pieces):
        rows = (1 if number == len(pieces) - 1 else 0) if more else None
        members.append(
            {
                "name": name,
                "offset": place,
                "packed": len(piece),
                "sha256": digests[piece],
                "bytes": 4 * MEGABYTE,
                "rows": rows,
            }
        )
        place += len(piece)
    tables = [{**manifest["tables"][0], **more}]
    whole = {
        **manifest,
        "header": {**manifest["header"], "rows": tables[0]["rows"]},
        "tables": tables,
    }
    _finish(file, packed + b"".join(pieces), json.dumps({**whole, "members": members}))


def _many_members(file: Path, kind: str, database: Path) -> None:
    """Write a backup with many members of one byte, with different names if the kind of database
    allows it.
    """
    manifest, files = _manifest(kind, database)
    packed, members = _packed(files)
    place = len(packed)
    for number in range(290_000):
        name = (
            "database.sqlite3"
            if kind == "sqlite"
            else f"data/0001-public.users/{number + 2:04}.copy"
        )
        members.append(
            {"name": name, "offset": place, "packed": 1, "sha256": f"{number:064x}", "bytes": 0,
             "rows": None if kind == "sqlite" else 0}
        )  # fmt: skip
        place += 1
    text = json.dumps({**manifest, "members": members}, separators=(",", ":"))
    _finish(file, packed + bytes(290_000), text)


def _packed(files: Files) -> tuple[bytes, list[dict[str, Any]]]:
    """The gzip members of these files, and their entries in the manifest."""
    packed, members = b"", list[dict[str, Any]]()
    for name, content in files:
        data = gzip.compress(
            _tar_header(name, len(content)) + content + padding(len(content)), 1, mtime=0
        )
        place = {
            "name": name,
            "offset": len(packed),
            "packed": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        rows = content.count(b"\n") if name.endswith(".copy") else None
        members.append({**place, "bytes": len(content), "rows": rows})
        packed += data
    return packed, members


def _tar_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def _finish(file: Path, packed: bytes, text: str) -> None:
    """Write the packed files, a manifest with this text, and the trailer."""
    data = text.encode("utf-8", "surrogatepass")
    level = 9 if len(data) > 2 * MEGABYTE else 1
    packer = zlib.compressobj(level, zlib.DEFLATED, 31)
    whole = _tar_header("manifest.json", len(data)) + data + padding(len(data)) + TAR_END
    last = packer.compress(whole) + packer.flush()
    trailer = Trailer(len(packed), len(last), hashlib.sha256(last).digest())
    file.write_bytes(packed + last + trailer.pack())
