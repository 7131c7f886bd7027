"""Reads from the catalog of a PostgreSQL database which tables and sequences a backup holds.

Relations that a backup could not hold, or not correctly, are refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from batch_system.backup.file.selection import LEDGERS_MARK, Selection, is_ledgers, quoted
from batch_system.errors import BackupError

# The column "above": for a partition the tables that it belongs to; for the sequence of a column,
# the column's table.
RELATIONS = """
SELECT n.nspname AS schema,
    c.relname AS name,
    c.relkind::text AS kind,
    c.relpersistence = 'u' AS is_unlogged,
    columns.names,
    columns.types,
    ARRAY(
        SELECT a.attname::text
        FROM pg_catalog.pg_index i, unnest(i.indkey) WITH ORDINALITY k(attnum, place)
        JOIN pg_catalog.pg_attribute a ON a.attnum = k.attnum
        WHERE i.indrelid = c.oid AND i.indisprimary AND a.attrelid = c.oid
        ORDER BY k.place
    ) AS key,
    ARRAY(
        SELECT above.oid::text FROM (
            SELECT relid FROM pg_catalog.pg_partition_ancestors(c.oid) WHERE relid <> c.oid
            UNION ALL
            SELECT refobjid FROM pg_catalog.pg_depend
            WHERE c.relkind = 'S' AND deptype IN ('a', 'i') AND objid = c.oid
                AND classid = 'pg_catalog.pg_class'::regclass
                AND refclassid = 'pg_catalog.pg_class'::regclass
        ) u(oid)
        JOIN pg_catalog.pg_class above ON above.oid = u.oid
        ORDER BY 1
    ) AS above,
    c.oid::text AS oid,
    pg_catalog.row_security_active(c.oid) AS has_row_security,
    pg_catalog.has_schema_privilege(n.oid, 'USAGE')
        AND pg_catalog.has_table_privilege(c.oid, 'SELECT') AS may_be_read,
    EXISTS (
        SELECT FROM pg_catalog.pg_depend
        WHERE deptype = 'e' AND objid = c.oid AND classid = 'pg_catalog.pg_class'::regclass
    ) AS is_extensions
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace, LATERAL (
    SELECT COALESCE(array_agg(a.attname::text ORDER BY a.attnum), '{}') AS names,
        COALESCE(
            array_agg(pg_catalog.format_type(a.atttypid, a.atttypmod) ORDER BY a.attnum), '{}'
        ) AS types
    FROM pg_catalog.pg_attribute a
    WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
) columns
WHERE c.relkind IN ('r', 'p', 'S', 'f', 'm') AND c.relpersistence <> 't'
  AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')
ORDER BY 1, 2
"""

LARGE_OBJECTS = "SELECT EXISTS (SELECT FROM pg_catalog.pg_largeobject_metadata)"

_LEAVE_OUT = "Leave it out by BACKUP_EXCLUDE"


@dataclass(frozen=True)
class SourceRelation:
    """A relation of the database to back up: a table, a sequence, a foreign table or a materialized
    view.

    `kind`: PostgreSQL's relkind. `names`, `types`: its columns without the generated ones. `key`:
    the columns of the primary key. `above`: the oids of the tables that it belongs to.
    `is_extensions`: whether an extension owns it.
    """

    schema: str
    name: str
    kind: str
    is_unlogged: bool
    names: tuple[str, ...]
    types: tuple[str, ...]
    key: tuple[str, ...]
    above: tuple[str, ...]
    oid: str
    has_row_security: bool
    may_be_read: bool
    is_extensions: bool

    def __str__(self) -> str:
        """The quoted name for SQL."""
        return f"{quoted(self.schema)}.{quoted(self.name)}"

    @property
    def path(self) -> str:
        """The name with the schema, for messages and for the patterns of a selection."""
        return f"{self.schema}.{self.name}"


@dataclass(frozen=True)
class Contents:
    """What a backup holds. `tables`: those with rows, so the partitions of a partitioned table
    instead of that table.

    `left_out`: the paths of the tables that the backup leaves out. `versions`: the version tables
    of Alembic.
    """

    tables: list[SourceRelation]
    sequences: list[SourceRelation]
    left_out: list[str]
    versions: list[SourceRelation]


async def contents(connection: Any, selection: Selection) -> Contents:
    """Read which relations a backup with this selection holds. Raises BackupError for relations
    that a backup can't hold.
    """
    relations = [_relation(row) for row in await connection.fetch(RELATIONS)]
    by_oid = {relation.oid: relation for relation in relations}

    def names(relation: SourceRelation) -> list[str]:
        family = [relation, *(by_oid[oid] for oid in relation.above if oid in by_oid)]
        return [name for member in family for name in (member.path, member.name)]

    selection.refuse_idle_patterns(map(names, relations))
    ledgers = (
        set()
        if selection.ledger
        else {each.schema for each in relations if each.name == LEDGERS_MARK}
    )
    chosen = [
        relation
        for relation in relations
        if _is_chosen(relation, names(relation), ledgers, selection)
    ]
    _refuse(chosen)
    if await connection.fetchval(LARGE_OBJECTS):
        raise BackupError(
            "the database holds large objects, which these backups can't contain: use pg_dump"
        )
    tables = [relation for relation in chosen if relation.kind == "r"]
    saved = {table.oid for table in tables}
    return Contents(
        tables=tables,
        sequences=[relation for relation in chosen if relation.kind == "S"],
        left_out=[each.path for each in relations if each.kind in "rfm" and each.oid not in saved],
        versions=[
            each
            for each in relations
            if each.kind == "r" and each.names == ("version_num",) and each.may_be_read
        ],
    )


def _relation(row: Any) -> SourceRelation:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in row.items()
    }
    return SourceRelation(**values)


def _is_chosen(
    relation: SourceRelation, names: Iterable[str], ledgers: set[str], selection: Selection
) -> bool:
    if relation.is_extensions or (relation.schema in ledgers and is_ledgers(relation.name)):
        return False
    return relation.kind in "rSf" and selection.holds(names)


def _refuse(chosen: list[SourceRelation]) -> None:
    """Raises BackupError if a chosen relation would be missing or incomplete in a backup."""
    _refuse_those(
        chosen,
        lambda relation: relation.kind == "f",
        f"is a foreign table, whose rows are in another database: back that up. {_LEAVE_OUT}",
    )
    _refuse_those(
        chosen,
        lambda relation: relation.is_unlogged and relation.kind == "r",
        f"is unlogged, so a crash of the server empties it. {_LEAVE_OUT}, or ALTER TABLE … SET "
        "LOGGED",
    )
    _refuse_those(
        chosen,
        lambda relation: not relation.may_be_read,
        "may not be read by this role. A backup needs the owner, or a role with pg_read_all_data "
        "and BYPASSRLS (BACKUP_DATABASE_URL)",
    )
    _refuse_those(
        chosen,
        lambda relation: relation.has_row_security,
        "has row-level security, which hides rows from this role. A backup needs a role with "
        "BYPASSRLS (BACKUP_DATABASE_URL), or the owner where it is not forced",
    )


def _refuse_those(
    chosen: list[SourceRelation], condition: Callable[[SourceRelation], bool], reason: str
) -> None:
    refused = [relation.path for relation in chosen if condition(relation)]
    if refused:
        more = (
            f" (as are {len(refused) - 1} more: {', '.join(refused[1:4])})" if refused[1:] else ""
        )
        raise BackupError(f"the table {refused[0]} {reason}{more}.")
