"""Reads the parts of a PostgreSQL database that a restore needs from its catalog: tables, foreign
keys, triggers, sequences.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from batch_system.backup.file.selection import quoted

RELATIONS = """
SELECT c.oid AS id,
    n.nspname AS schema,
    c.relname AS name,
    c.relkind::text AS kind,
    c.relforcerowsecurity AS is_forced,
    pg_catalog.row_security_active(c.oid) AS is_hidden,
    pg_catalog.pg_has_role(c.relowner, 'USAGE') AS is_owned,
    pg_catalog.pg_get_userbyid(c.relowner) AS owner,
    (
        SELECT i.inhparent FROM pg_catalog.pg_inherits i
        WHERE i.inhrelid = c.oid AND c.relispartition
    ) AS parent
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'S', 'f', 'm', 'v') AND c.relpersistence <> 't'
  AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')
ORDER BY 2, 3
"""

COLUMNS = """
SELECT a.attrelid AS relation,
    a.attname AS name,
    pg_catalog.format_type(a.atttypid, a.atttypmod) AS type,
    a.attgenerated <> '' AS is_generated,
    a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AND t.typdefault IS NULL AS is_needed
FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
WHERE a.attrelid = ANY($1::oid[]) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""

# Keys that a partition inherits are left out: they are dropped and created together with the key of
# the parent.
KEYS = """
SELECT k.oid AS id,
    k.conname AS name,
    k.conrelid AS holder,
    k.confrelid AS referred,
    pg_catalog.pg_get_constraintdef(k.oid) AS text,
    pg_catalog.obj_description(k.oid, 'pg_constraint') AS comment
FROM pg_catalog.pg_constraint k
WHERE k.contype = 'f' AND k.conparentid = 0
ORDER BY k.conrelid, k.conname
"""

TRIGGERS = """
SELECT t.tgrelid AS relation, t.tgname AS name, t.tgenabled::text AS state
FROM pg_catalog.pg_trigger t
WHERE NOT t.tgisinternal
ORDER BY 1, 2
"""

SEQUENCES = """
SELECT s.seqrelid AS id,
    s.seqincrement AS step,
    s.seqmin AS least,
    s.seqmax AS most,
    d.refobjid AS relation,
    a.attname AS column
FROM pg_catalog.pg_sequence s
LEFT JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass
    AND d.objid = s.seqrelid
    AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
    AND d.refobjsubid > 0
    AND d.deptype IN ('a', 'i')
LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
"""

LARGE_OBJECTS = "SELECT EXISTS (SELECT FROM pg_catalog.pg_largeobject_metadata)"


@dataclass(frozen=True)
class Column:
    """A column of a table. `is_needed`: every row must have a value for it, because it has no
    default.
    """

    name: str
    type: str
    is_generated: bool
    is_needed: bool


@dataclass(frozen=True)
class TargetRelation:
    """A relation of the database that is restored into.

    `parent`: the id of the table that it is a partition of. `is_forced`: row security applies to
    its owner too; `is_hidden`: it applies to this role. `place`: the schema that the relation is
    in. It differs from `schema` only for a relation that stands for one in `schema`, as the copies
    of a trial restore do.
    """

    id: int
    schema: str
    place: str
    name: str
    kind: str
    is_forced: bool
    is_hidden: bool
    is_owned: bool
    owner: str
    parent: int | None
    columns: tuple[Column, ...] = ()

    @property
    def sql(self) -> str:
        return quoted(self.place, self.name)

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


@dataclass(frozen=True)
class ForeignKey:
    """A foreign key from the table `holder` to the table `referred` (ids). `text`: its definition
    in SQL.
    """

    id: int
    name: str
    holder: int
    referred: int
    text: str
    comment: str | None


@dataclass(frozen=True)
class Trigger:
    """A trigger. `state`: O is enabled, D is disabled, R fires on replicas only, A fires always."""

    relation: int
    name: str
    state: str


@dataclass(frozen=True)
class TargetSequence:
    """A sequence. `relation` and `column`: the column that takes its values from it, if there is
    one.
    """

    id: int
    step: int
    least: int
    most: int
    relation: int | None
    column: str | None


@dataclass(frozen=True)
class Target:
    """The database that is restored into. `relations` and `sequences`: by their ids."""

    relations: dict[int, TargetRelation]
    keys: tuple[ForeignKey, ...]
    triggers: tuple[Trigger, ...]
    sequences: dict[int, TargetSequence]
    has_large_objects: bool

    def find(self, schema: str | None, name: str) -> TargetRelation | None:
        relations = self.relations.values()
        return next(
            (
                relation
                for relation in relations
                if (relation.schema, relation.name) == (schema, name)
            ),
            None,
        )

    def with_parents(self, relations: Collection[TargetRelation]) -> set[int]:
        """The ids of these relations, and of the partitioned tables that they belong to."""
        ids: set[int] = set()
        for relation in relations:
            current: int | None = relation.id
            while current is not None and current not in ids:
                ids.add(current)
                current = self.relations[current].parent if current in self.relations else None
        return ids

    def keys_of(self, relations: Collection[TargetRelation]) -> list[ForeignKey]:
        """The foreign keys from or to one of these relations or its parents."""
        ids = self.with_parents(relations)
        return [key for key in self.keys if key.holder in ids or key.referred in ids]


async def read_target(connection: Any) -> Target:
    """Read the target. The search path is empty meanwhile, so that the names of types include their
    schemas.
    """
    search_path = await connection.fetchval("SELECT pg_catalog.current_setting('search_path')")
    await connection.execute("SELECT pg_catalog.set_config('search_path', '', false)")
    relations = await connection.fetch(RELATIONS)
    columns: dict[int, list[Column]] = {row["id"]: [] for row in relations}
    for row in await connection.fetch(COLUMNS, list(columns)):
        fields = dict(row)
        columns[fields.pop("relation")].append(Column(**fields))
    target = Target(
        {
            row["id"]: TargetRelation(**row, place=row["schema"], columns=tuple(columns[row["id"]]))
            for row in relations
        },
        tuple(ForeignKey(**row) for row in await connection.fetch(KEYS)),
        tuple(Trigger(**row) for row in await connection.fetch(TRIGGERS)),
        {row["id"]: TargetSequence(**row) for row in await connection.fetch(SEQUENCES)},
        await connection.fetchval(LARGE_OBJECTS),
    )
    await connection.execute("SELECT pg_catalog.set_config('search_path', $1, false)", search_path)
    return target
