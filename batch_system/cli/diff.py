"""`batch backup diff`: what differs between a backup and the database, or between two backups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from batch_system.cli.backup import LOGGED, LONGEST_SHOWN, MOST_NAMED, MOST_SHOWN, File
from batch_system.cli.opening import ask, backups_of
from batch_system.cli.options import AsJson, first_of, within
from batch_system.escaping import brief
from batch_system.words import utc

if TYPE_CHECKING:
    from batch_system.backup.comparing.differences import Difference, Side, TableDifference

Other = Annotated[
    str | None,
    typer.Argument(metavar="[FILE]", help="The later backup; default: the database as it is now."),
]
FIGURES = ("rows before", "rows after", "added", "changed", "removed")


def diff(file: File, other: Other = None, as_json: AsJson = False) -> None:
    """Compare a backup with the database as it is now, or with a later backup.

    The output has, for each table, the number of rows before and after, and how many rows were
    added, changed and removed. It also shows differences of tables and columns, and the migration
    of both sides. Values are not shown.

    Rows are matched by the primary key. For a table without a primary key, the output only says
    whether rows differ. Nothing is changed.
    """
    difference = ask(lambda service: backups_of(service).diff(file, other), log_level=LOGGED)
    if as_json:
        from batch_system import console

        console.show_json(_facts(difference))
    else:
        _show(difference)


def _show(difference: Difference) -> None:
    from batch_system import console

    sides = {"before": _side(difference.before), "after": _side(difference.after)}
    console.show_values({**sides, "migration": _migration(difference)})
    if difference.schema:
        console.heading("Schema")
        for sentence in first_of(difference.schema, MOST_SHOWN):
            console.say(sentence)
    console.heading("Rows")
    rows = [_row(table) for table in difference.tables[:MOST_SHOWN]]
    widths = {name: max(map(len, (name, *(row[name] for row in rows)))) for name in FIGURES}
    padded = [{**row, **{name: row[name].rjust(widths[name]) for name in FIGURES}} for row in rows]
    console.show(padded, ("table", *FIGURES, "note"), as_json=False)
    if len(difference.tables) > MOST_SHOWN:
        console.say(f"and {len(difference.tables) - MOST_SHOWN:,} more tables")
    console.say()
    console.say(_total(difference))
    if difference.left_out:
        names = ", ".join(
            first_of([brief(name, LONGEST_SHOWN) for name in difference.left_out], MOST_NAMED)
        )
        console.say(f"not compared, because one side leaves them out: {names}")


def _side(side: Side) -> str:
    return f"{side.name}, {utc(side.taken_at)}"


def _migration(difference: Difference) -> str | None:
    before, after = difference.before.revision, difference.after.revision
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
        return (
            f"no usable primary key: {'all rows are equal' if table.same else 'some rows differ'}"
        )
    return ""


def _number(number: int | None, sign: str = "") -> str:
    if number is None:
        return "-"
    return f"{sign if number else ''}{number:,}"


def _total(difference: Difference) -> str:
    tables = f"{len(difference.tables):,} table{'s' if len(difference.tables) != 1 else ''}"
    added, removed = _number(difference.added, "+"), _number(difference.removed, "-")
    total = f"{tables} · {added} added · {difference.changed:,} changed · {removed} removed"
    uncounted = sum(table.added is None and not table.same for table in difference.tables)
    if not uncounted:
        return total
    return (
        f"{total} · {uncounted} table{'s' if uncounted != 1 else ''} without a usable key changed"
    )


def _facts(difference: Difference) -> dict[str, Any]:
    from dataclasses import asdict

    tables = within(difference.tables, lambda table: [table.table, *table.key, *table.schema])
    return {
        "before": _facts_of(difference.before),
        "after": _facts_of(difference.after),
        "tables": [asdict(table) for table in tables],
        "more tables": len(difference.tables) - len(tables),
        "added": difference.added,
        "changed": difference.changed,
        "removed": difference.removed,
        "schema": within(difference.schema, lambda sentence: [sentence]),
        "left_out": within(difference.left_out, lambda name: [name]),
    }


def _facts_of(side: Side) -> dict[str, Any]:
    names = ("name", "taken_at", "kind", "database", "revision", "revisions")
    return {name: getattr(side, name) for name in names}
