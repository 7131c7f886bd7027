"""`batch backup diff`: what differs between a backup and the database, or between two backups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.backup import LOGGED, LONGEST_SHOWN, MOST_NAMED, MOST_SHOWN, File
from service.cli.opening import ask
from service.cli.options import AsJson, first_of, utc, within
from service.escaping import brief

if TYPE_CHECKING:
    from service.backup.comparing.differences import Difference, Side, TableDifference

Other = Annotated[
    str | None, typer.Argument(metavar="[FILE]", help="The later one. Without it: the database as it is now.")
]
FIGURES = ("rows before", "rows after", "added", "changed", "removed")


def diff(file: File, other: Other = None, as_json: AsJson = False) -> None:
    """Compare a backup with the database as it is now, or with a later backup.

    Shows for each table the rows before and after, and how many were added, changed and removed; what is different
    about tables and columns; and the migrations of both. Rows are told apart by the primary key: of a table without one
    it is only said whether its rows differ. Nothing is changed, and values are not shown.
    """
    found = ask(lambda operations: operations.backups.diff(file, other), log_level=LOGGED)
    if as_json:
        from service import console

        console.show_json(_facts(found))
    else:
        _show(found)


def _show(found: Difference) -> None:
    from service import console

    console.show_values({"before": _side(found.before), "after": _side(found.after), "migration": _migration(found)})
    if found.schema:
        console.heading("Schema")
        for sentence in first_of(found.schema, MOST_SHOWN):
            console.say(sentence)
    console.heading("Rows")
    rows = [_row(table) for table in found.tables[:MOST_SHOWN]]
    widths = {name: max(map(len, (name, *(row[name] for row in rows)))) for name in FIGURES}
    padded = [{**row, **{name: row[name].rjust(widths[name]) for name in FIGURES}} for row in rows]
    console.show(padded, ("table", *FIGURES, "note"), as_json=False)
    if len(found.tables) > MOST_SHOWN:
        console.say(f"and {len(found.tables) - MOST_SHOWN:,} more tables")
    console.say()
    console.say(_total(found))
    if found.left_out:
        names = ", ".join(first_of([brief(name, LONGEST_SHOWN) for name in found.left_out], MOST_NAMED))
        console.say(f"not compared, as one of the two leaves them out: {names}")


def _side(side: Side) -> str:
    return f"{side.name}, {utc(side.taken_at)}"


def _migration(found: Difference) -> str | None:
    before, after = found.before.revision, found.after.revision
    if before == after:
        return f"{brief(before)} on both sides" if before else None
    return f"{brief(before or 'none')} to {brief(after or 'none')}"


def _row(table: TableDifference) -> dict[str, Any]:
    figures = (
        _number(table.rows_before),
        _number(table.rows_after),
        _number(table.added, "+"),
        _number(table.changed),
        _number(table.removed, "-"),
    )
    return {
        "table": brief(table.table, LONGEST_SHOWN),
        **dict(zip(FIGURES, figures, strict=True)),
        "note": _note(table),
    }


def _note(table: TableDifference) -> str:
    if table.added is None:
        return f"no key tells its rows apart: {'the same' if table.same else 'some differ'}"
    return ""


def _number(number: int | None, sign: str = "") -> str:
    if number is None:
        return "-"
    return f"{sign if number else ''}{number:,}"


def _total(found: Difference) -> str:
    tables = f"{len(found.tables):,} table{'s' if len(found.tables) != 1 else ''}"
    added, removed = _number(found.added, "+"), _number(found.removed, "-")
    said = f"{tables} · {added} added · {found.changed:,} changed · {removed} removed"
    unclear = sum(table.added is None and not table.same for table in found.tables)
    return f"{said} · {unclear} without a key differ{'s' if unclear == 1 else ''}" if unclear else said


def _facts(found: Difference) -> dict[str, Any]:
    from dataclasses import asdict

    tables = within(found.tables, lambda table: [table.table, *table.key, *table.schema])
    return {
        "before": _facts_of(found.before),
        "after": _facts_of(found.after),
        "tables": [asdict(table) for table in tables],
        "more tables": len(found.tables) - len(tables),
        "added": found.added,
        "changed": found.changed,
        "removed": found.removed,
        "schema": within(found.schema, lambda sentence: [sentence]),
        "left_out": within(found.left_out, lambda name: [name]),
    }


def _facts_of(side: Side) -> dict[str, Any]:
    names = ("name", "taken_at", "kind", "database", "revision", "revisions")
    return {name: getattr(side, name) for name in names}
