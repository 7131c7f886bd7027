"""What a PostgreSQL database holds that a restore has to know: tables, keys between them, triggers, sequences."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from service.backup.file.selection import quoted

RELATIONS = """
SELECT c.oid AS id, n.nspname AS schema, c.relname AS name, c.relkind::text AS kind, c.relforcerowsecurity AS is_forced,
    pg_catalog.row_security_active(c.oid) AS is_hidden,
    pg_catalog.pg_has_role(c.relowner, 'USAGE') AS is_owned, pg_catalog.pg_get_userbyid(c.relowner) AS owner,
    (SELECT i.inhparent FROM pg_catalog.pg_inherits i WHERE i.inhrelid = c.oid AND c.relispartition) AS parent
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'S', 'f', 'm', 'v') AND c.relpersistence <> 't'
  AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')
ORDER BY 2, 3
"""

COLUMNS = """
SELECT a.attrelid AS relation, a.attname AS name, pg_catalog.format_type(a.atttypid, a.atttypmod) AS type,
    a.attgenerated <> '' AS is_generated,
    a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AND t.typdefault IS NULL AS is_needed
FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
WHERE a.attrelid = ANY($1::oid[]) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""

# Those that a partition has from its parent come and go with the parent's.
KEYS = """
SELECT k.oid AS id, k.conname AS name, k.conrelid AS holder, k.confrelid AS referred,
    pg_catalog.pg_get_constraintdef(k.oid) AS text, pg_catalog.obj_description(k.oid, 'pg_constraint') AS comment
FROM pg_catalog.pg_constraint k WHERE k.contype = 'f' AND k.conparentid = 0 ORDER BY k.conrelid, k.conname
"""

TRIGGERS = """
SELECT t.tgrelid AS relation, t.tgname AS name, t.tgenabled::text AS state FROM pg_catalog.pg_trigger t
WHERE NOT t.tgisinternal ORDER BY 1, 2
"""

SEQUENCES = """
SELECT s.seqrelid AS id, s.seqincrement AS step, s.seqmin AS least, s.seqmax AS most, d.refobjid AS relation,
    a.attname AS column
FROM pg_catalog.pg_sequence s
LEFT JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.objid = s.seqrelid
    AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.refobjsubid > 0 AND d.deptype IN ('a', 'i')
LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
"""

LARGE_OBJECTS = "SELECT EXISTS (SELECT FROM pg_catalog.pg_largeobject_metadata)"


@dataclass(frozen=True)
class Column:
    """`is_needed`: a row must give it a value."""

    name: str
    type: str
    is_generated: bool
    is_needed: bool


@dataclass(frozen=True)
class Relation:
    """`parent`: of a partition. `is_forced`: row security holds for the owner too; `is_hidden`: for this role.

    `place` is the schema that it is in. It differs from `schema` where it stands for a relation of that one.
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
class Key:
    """A foreign key; `holder` has it, and refers to `referred`."""

    id: int
    name: str
    holder: int
    referred: int
    text: str
    comment: str | None


@dataclass(frozen=True)
class Trigger:
    """`state`: O is enabled, D disabled, R for replicas, A always."""

    relation: int
    name: str
    state: str


@dataclass(frozen=True)
class Counter:
    """A sequence. `relation` and `column`: whose values it makes."""

    id: int
    step: int
    least: int
    most: int
    relation: int | None
    column: str | None


@dataclass(frozen=True)
class Target:
    relations: dict[int, Relation]
    keys: tuple[Key, ...]
    triggers: tuple[Trigger, ...]
    sequences: dict[int, Counter]
    has_large_objects: bool

    def find(self, schema: str | None, name: str) -> Relation | None:
        return next((r for r in self.relations.values() if (r.schema, r.name) == (schema, name)), None)

    def with_parents(self, relations: Collection[Relation]) -> set[int]:
        """The ids of these, and of the partitioned tables that they are parts of."""
        found: set[int] = set()
        for relation in relations:
            one: int | None = relation.id
            while one is not None and one not in found:
                found.add(one)
                one = self.relations[one].parent if one in self.relations else None
        return found

    def keys_of(self, relations: Collection[Relation]) -> list[Key]:
        """Those that begin or end at one of these."""
        ids = self.with_parents(relations)
        return [key for key in self.keys if key.holder in ids or key.referred in ids]


async def look(connection: Any) -> Target:
    """What is there, with types as they are written with an empty search path, which is put back afterwards."""
    before = await connection.fetchval("SELECT pg_catalog.current_setting('search_path')")
    await connection.execute("SELECT pg_catalog.set_config('search_path', '', false)")
    relations = await connection.fetch(RELATIONS)
    columns: dict[int, list[Column]] = {row["id"]: [] for row in relations}
    for row in await connection.fetch(COLUMNS, list(columns)):
        facts = dict(row)
        columns[facts.pop("relation")].append(Column(**facts))
    found = Target(
        {row["id"]: Relation(**row, place=row["schema"], columns=tuple(columns[row["id"]])) for row in relations},
        tuple(Key(**row) for row in await connection.fetch(KEYS)),
        tuple(Trigger(**row) for row in await connection.fetch(TRIGGERS)),
        {row["id"]: Counter(**row) for row in await connection.fetch(SEQUENCES)},
        await connection.fetchval(LARGE_OBJECTS),
    )
    await connection.execute("SELECT pg_catalog.set_config('search_path', $1, false)", before)
    return found
