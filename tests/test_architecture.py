"""The shape of the code: who may import whom, who reads the clock and the environment, how large
things are.

Each rule is a function from modules to what breaks it. It is tried on the project, and on made-up
code that breaks it.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

import batch_system

ROOT = Path(__file__).parent.parent

PAGE = ROOT / "docs/architecture.md"
LIST = PAGE.read_text().partition("| rooms in `batch_system/` |")[2].partition("\n\n")[0]
ROOMS = tuple(
    f"batch_system.{place.replace('/', '.')}" for place in re.findall(r"`([\w/]+)`", LIST)
)
"""The rooms from the ground up, as the page lists them: modules and packages."""

DOORS = {
    "batch_system": None,
    "batch_system.__main__": None,
    "batch_system.app": "batch_system.server.app",
    "batch_system.batch": None,
    "batch_system.config": "batch_system.settings.reading",
}
"""Modules of no room. Those with a target name again what people import from there, and have no
code of their own.
"""

ONLY = {
    "cronsim": "batch_system.batch.cron",
    "uvicorn": "batch_system.server.uvicorn",
    "sentry_sdk": "batch_system.sentry",
    "opentelemetry": "batch_system.tracing",
    "obstore": "batch_system.backup.places.s3",
    "typer": "batch_system.cli",
    "alembic": "batch_system.database.alembic_history",
    "prometheus_client": "batch_system.web.exposition",
    "distributed": "batch_system.dask",
    "dask": "batch_system.dask",
}
"""Libraries that one module or package knows. (apscheduler has a rule of its own: its types are in
annotations.)
"""

PURE = (
    *(
        "batch_system.batch.firing.misfires",
        "batch_system.batch.incidents.forecast",
        "batch_system.batch.incidents.forecast_telling",
        "batch_system.batch.cron.cron",
        "batch_system.batch.ledger.states",
        "batch_system.batch.tasks.declaration",
    ),
    *(
        "batch_system.batch.cron.calendar",
        "batch_system.batch.cron.expression",
        "batch_system.batch.cron.spread",
        "batch_system.batch.cron.zones",
        "batch_system.batch.cron.utc_offsets",
        "batch_system.batch.lint.clock_changes",
        "batch_system.batch.lint.lint",
        "batch_system.batch.lint.blocking",
    ),
)
"""They decide and compute: no database, no clock, no event loop."""

BROAD = {
    "batch_system.web.live": 1,  # a background loop
    "batch_system.pages.frame.blocks": 1,  # a block of a page that fails
    "batch_system.pages.frame.answers": 1,  # a page that fails by a mistake of ours
    "batch_system.pages.frame.watch": 1,  # what renders a page that many watch
    "batch_system.batch.incidents.watch": 1,  # a background loop
    "batch_system.batch.night.keeper": 1,  # a background loop
    "batch_system.server.digest": 1,  # a background loop
    "batch_system.batch.firing.limit_functions": 2,  # a background loop, and an author's function
    # A background loop, and a call of an address that httpx may not be able to read
    "batch_system.alerts.pings": 2,
    "batch_system.alerts.sender": 2,  # a background loop, and one for each channel
    "batch_system.settings.reading": 1,  # the module that SETTINGS names
    # What an author does with one item, outside and inside the transaction
    "batch_system.batch.tasks.item_task": 2,
    # What a chunk's block, or its beginning, raises; told again unless it is retried
    "batch_system.batch.chunks.chunks": 2,
    "batch_system.batch.firing.dispatcher": 1,  # a background loop
    "batch_system.batch.firing.handover": 1,  # a background loop
    "batch_system.batch.firing.waiting": 1,  # a background loop
    "batch_system.batch.execution.engine": 1,  # a background loop
    "batch_system.batch.tasks.discovery": 2,  # authors' files, and the package they are in
    "batch_system.batch.placing.placing": 1,  # a background loop
    "batch_system.dask.cluster": 2,  # a background loop, and a look at a scheduler that may be gone
    "batch_system.dask.plugin": 1,  # a background loop
    "batch_system.server.hosted_node": 1,  # a thread's
    "batch_system.server.pools": 1,  # an author's module
    "batch_system.server.readiness": 1,  # a background loop
    "batch_system.server.service": 1,  # a background loop
    "batch_system.batch.nodes.heartbeat": 2,  # a background loop, and its thread
    "batch_system.batch.nodes.new_tasks": 1,  # a background loop
    "batch_system.batch.tasks.parameters": 1,  # an author's annotations are evaluated
    "batch_system.batch.tasks.declaration": 2,  # an author's constructor and properties
    "batch_system.batch.tasks.registry": 1,  # an author's class
    "batch_system.batch.execution.attempt": 1,  # the attempt
    "batch_system.batch.pools.nursery_process": 1,  # an author's module
    "batch_system.batch.execution.ending": 2,  # an author's `expect`, and a result as text
    "batch_system.batch.firing.apscheduler": 2,  # a job must not stop the scheduler
    "batch_system.batch.firing.schedule_sync": 1,  # a background loop
    "batch_system.batch.retention.upkeep": 1,  # a background loop
    "batch_system.concurrency.thread_pool": 1,  # the attempt, in a thread
    "batch_system.escaping": 1,  # authors' __repr__
    "batch_system.failures": 3,  # authors' __str__, and what else Python looks for in an exception
    "batch_system.logs.log_lines": 2,  # authors' __str__
    "batch_system.logs.structured": 1,  # authors' __str__
    "batch_system.logs.handlers": 1,  # the loop that renders and writes lines
}
"""Where Exception, BaseException or everything may be caught, and how often. Who raises it again is
not counted.
"""

MOST_LINES = 400
MOST_LINES_OF_STORIES = 700
MAIN_STORIES = {
    "batch_system.batch.execution.attempt",
    "batch_system.batch.execution.engine",
    "batch_system.batch.incidents.checks",
    "batch_system.batch.incidents.forecast",
    "batch_system.batch.incidents.noticing",
    "batch_system.batch.ledger.tables",
    "batch_system.batch.ledger.transitions",
    "batch_system.batch.ledger.waits",
    "batch_system.batch.nodes.heartbeat",
    "batch_system.batch.tasks.declaration",
    "batch_system.database.engine",
    "batch_system.demo.cast",
    "batch_system.operations.night.night",
    "batch_system.server.service",
}
"""A main story stands whole in one file."""
MOST_BODY_LINES = 55
MOST_COLUMNS_OF_TEMPLATES = 160
"""Of Python, ruff says how wide a line may be."""
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "managers", "manager", "core"}


@dataclass(frozen=True)
class Module:
    name: str
    text: str
    is_package: bool = False

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @property
    def part(self) -> str:
        """The part of the project that it belongs to: the name after `batch_system`."""
        return self.name.split(".")[1] if "." in self.name else ""

    def imports(self) -> Iterator[tuple[int, str, str | None]]:
        """Line, module, name (None for `import module`), wherever in the file; relative ones made
        absolute.
        """
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name, None) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((node.lineno, self._absolute(node), alias.name) for alias in node.names)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if node.level == 0:
            return node.module or ""
        own = self.name.split(".")
        base = own[: len(own) - node.level + self.is_package]
        return ".".join([*base, *([node.module] if node.module else [])])


Rule = Callable[[list[Module]], list[str]]


def modules_in(folder: Path) -> Iterator[Module]:
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        yield Module(".".join(parts[:-1] if is_package else parts), path.read_text(), is_package)


@pytest.fixture(scope="module")
def project() -> list[Module]:
    """batch_system/ and tasks/, without the migrations, which import nothing of ours."""
    found = [*modules_in(ROOT / "batch_system"), *modules_in(ROOT / "tasks")]
    return [module for module in found if ".migrations." not in module.name]


def inside(modules: Iterable[Module]) -> list[Module]:
    return [module for module in modules if module.name.split(".")[0] == "batch_system"]


def targets(module: Module, known: set[str]) -> Iterator[tuple[int, str]]:
    """The modules of the project that it imports: `from batch_system.cli import runs` means
    batch_system.cli.runs.
    """
    for line, base, name in module.imports():
        whole = f"{base}.{name}"
        target = whole if whole in known else base
        if target in known:
            yield line, target


# The rules.


def room_of(name: str, rooms: Sequence[str]) -> str | None:
    """The innermost room that a module is in."""
    return max((room for room in rooms if f"{name}.".startswith(f"{room}.")), key=len, default=None)


def imports_that_point_up(modules: list[Module], rooms: Sequence[str] = ROOMS) -> list[str]:
    """A room imports only rooms below it. A module in no room may be imported only by the root
    package itself.
    """
    known = {module.name for module in modules}
    wrong = []
    for module in inside(modules):
        own = room_of(module.name, rooms)
        if own is None:
            continue
        for line, target in targets(module, known):
            other = room_of(target, rooms)
            if target != "batch_system" and (
                other is None or rooms.index(other) > rooms.index(own)
            ):
                wrong.append(f"{module.name}:{line} imports {target}")
    return wrong


def test_a_door_names_what_is_elsewhere_and_has_no_code_of_its_own(project: list[Module]) -> None:
    for module in project:
        if target := DOORS.get(module.name):
            [_, *statements] = module.tree.body
            assert statements and all(
                isinstance(one, ast.ImportFrom) and one.module == target for one in statements
            )


def test_the_first_line_of_each_room_says_what_it_knows(project: list[Module]) -> None:
    said = {m.name: (ast.get_docstring(m.tree) or "").split("\n\n")[0] for m in project}
    assert len(ROOMS) > 60
    assert [room for room in ROOMS if not said[room].endswith(".")] == []
    assert len({said[room] for room in ROOMS}) == len(ROOMS)


def modules_without_a_room(modules: list[Module]) -> list[str]:
    return [
        m.name for m in inside(modules) if room_of(m.name, ROOMS) is None and m.name not in DOORS
    ]


def imports_of_the_root_or_of_tasks(modules: list[Module]) -> list[str]:
    """Nothing inside batch_system/ imports what the root package names, nor what authors write."""
    known = {module.name for module in modules}
    wrong = []
    for module in inside(modules):
        for line, base, name in module.imports():
            is_root = base == "batch_system" and f"batch_system.{name}" not in known
            if is_root or base.split(".")[0] == "tasks":
                wrong.append(f"{module.name}:{line} imports {name or 'all'} from {base}")
    return wrong


def cycles(modules: list[Module]) -> list[str]:
    """Each cycle once, by a depth-first walk. A package's own imports count as they do when it is
    loaded.
    """
    known = {module.name for module in modules}
    graph = {
        m.name: sorted({t for _, t in targets(m, known)} - {m.name})
        for m in modules
        if m.name != "batch_system"
    }
    done: set[str] = set()
    found = []

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done and name in graph:
            for target in graph[name]:
                walk(target, [*path, name])
            done.add(name)

    for name in graph:
        walk(name, [])
    return found


STILL_OPEN: set[tuple[str, str]] = set()
"""Pairs of folders that import each other. The list may only become shorter."""


def pairs_of_folders(modules: list[Module]) -> set[tuple[str, str]]:
    """Folders that import each other, at any depth; also a folder and one inside it."""
    folders = {module.name: _folder_of(module) for module in inside(modules)}
    arrows = {
        (folders[module.name], folders[target])
        for module in inside(modules)
        for _, target in targets(module, set(folders))
    }
    return {(a, b) for a, b in arrows if a < b and (b, a) in arrows}


def _folder_of(module: Module) -> str:
    """A module beside the folders of `batch_system` is a room of its own."""
    folder = module.name.rpartition(".")[0]
    return module.name if module.is_package or folder == "batch_system" else folder


def folders_that_import_each_other(modules: list[Module]) -> list[str]:
    return [f"{a} and {b}" for a, b in sorted(pairs_of_folders(modules) - STILL_OPEN)]


def test_a_pair_of_folders_that_was_parted_is_no_longer_open(project: list[Module]) -> None:
    assert pairs_of_folders(project) == STILL_OPEN


def foreign_apscheduler(modules: list[Module]) -> list[str]:
    """Only firing/apscheduler.py uses apscheduler. Elsewhere its names may stand in annotations,
    and nowhere else.
    """
    wrong = []
    for module in modules:
        if module.name == "batch_system.batch.firing.apscheduler":
            continue
        for line, base, name in module.imports():
            if base.split(".")[0] == "apscheduler" and (
                name is None or _is_used(module.tree, name)
            ):
                wrong.append(f"{module.name}:{line} uses {name or base}")
    return wrong


def _is_used(tree: ast.Module, name: str) -> bool:
    """Whether `name` stands anywhere but in an annotation."""
    annotations: list[ast.expr | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign | ast.arg):
            annotations.append(node.annotation)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            annotations.append(node.returns)
    typed = {id(n) for annotation in annotations if annotation for n in ast.walk(annotation)}
    return any(
        isinstance(n, ast.Name) and n.id == name and id(n) not in typed for n in ast.walk(tree)
    )


def foreign_libraries(modules: list[Module]) -> list[str]:
    return [
        f"{module.name}:{line} imports {base}"
        for module in modules
        for line, base, _ in module.imports()
        if not f"{module.name}.".startswith(f"{ONLY.get(base.split('.')[0], module.name)}.")
    ]


def impure_imports(modules: list[Module]) -> list[str]:
    dirty = (
        "sqlalchemy",
        "asyncio",
        "threading",
        "batch_system.clock",
        "batch_system.database",
        "batch_system.settings.reading",
        "batch_system.settings.settings",
    )
    return [
        f"{module.name}:{line} imports {base}"
        for module in modules
        if module.name in PURE
        for line, base, name in module.imports()
        if f"{base}.{name}".startswith(dirty)
    ]


CLOCKS = {"now", "utcnow", "today"}


def clock_reads(modules: list[Module]) -> list[str]:
    """Only clock.py imports `time`, and asks datetime or date for the present."""
    wrong = []
    for module in modules:
        if module.name == "batch_system.clock":
            continue
        wrong += [
            f"{module.name}:{line} imports time"
            for line, base, _ in module.imports()
            if base == "time"
        ]
        wrong += [
            f"{module.name}:{node.lineno} {ast.unparse(node)}"
            for node in _calls(module)
            if _reads_time(node)
        ]
    return wrong


def _calls(module: Module) -> Iterator[ast.Call]:
    return (node for node in module.nodes if isinstance(node, ast.Call))


def _reads_time(call: ast.Call) -> bool:
    function = call.func
    if not isinstance(function, ast.Attribute):
        return False
    owner = ast.unparse(function.value)
    if function.attr == "time":  # loop.time(); `datetime.time()` takes a time out of one
        return "loop" in owner
    return function.attr in CLOCKS and owner != "clock"


ENVIRONMENT = (
    "batch_system.settings.settings",
    "batch_system.testing.postgres",
    "batch_system.demo.files",  # hides the settings of the caller
)
"""Where everything may be read. (Where the tests' server is, is no setting.)"""


def environment_reads(modules: list[Module]) -> list[str]:
    wrong = []
    for module in modules:
        if module.name in ENVIRONMENT:
            continue
        wrong += [
            f"{module.name}:{node.lineno} {ast.unparse(node)}"
            for node in module.nodes
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv")
        ]
        wrong += [
            f"{module.name}:{line} {name}"
            for line, base, name in module.imports()
            if base == "os" and name
        ]
    return wrong


def long_modules(modules: list[Module]) -> list[str]:
    sizes = ((module.name, len(module.text.splitlines())) for module in modules)
    return [
        f"{name} has {lines} lines"
        for name, lines in sizes
        if lines > (MOST_LINES_OF_STORIES if name in MAIN_STORIES else MOST_LINES)
    ]


def long_functions(modules: list[Module]) -> list[str]:
    return [
        f"{module.name}:{node.lineno} {node.name} has {lines} lines"
        for module in modules
        for node in module.nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := _body_lines(node)) > MOST_BODY_LINES
    ]


def _body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without the signature and the docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def broad_excepts(modules: list[Module]) -> list[str]:
    counts = {module.name: sum(map(_is_broad, module.nodes)) for module in modules}
    names = sorted(counts.keys() | BROAD.keys())
    return [
        f"{name}: {counts.get(name, 0)}, allowed {BROAD.get(name, 0)}"
        for name in names
        if counts.get(name, 0) != BROAD.get(name, 0)
    ]


def _is_broad(node: ast.AST) -> bool:
    if isinstance(node, ast.ExceptHandler):
        return (node.type is None or _names_all(node.type)) and not _flies_on(node)
    return (
        isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("suppress")
        and any(map(_names_all, node.args))
    )


def _names_all(node: ast.expr) -> bool:
    caught = node.elts if isinstance(node, ast.Tuple) else [node]
    return any(
        isinstance(one, ast.Name) and one.id in ("Exception", "BaseException") for one in caught
    )


def _flies_on(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


PRINTERS = ("batch_system.console", "batch_system.testing.postgres")
"""Where print() may stand. (What the tests' server gets is no terminal's.)"""


def prints(modules: list[Module]) -> list[str]:
    """All output goes through console.py, which escapes control characters."""
    return [
        f"{module.name}:{node.lineno} {ast.unparse(node)}"
        for module in inside(modules)
        if module.name not in PRINTERS
        for node in _calls(module)
        if ast.unparse(node.func)
        in ("print", "sys.stdout.write", "sys.stderr.write", "typer.echo", "typer.secho")
    ]


def left_for_later(modules: list[Module]) -> list[str]:
    marks = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b")
    return [
        f"{module.name}:{token.start[0]} {token.string}"
        for module in modules
        if marks.search(module.text)  # tokens of all modules take two seconds
        for token in tokenize.generate_tokens(io.StringIO(module.text).readline)
        if token.type in (tokenize.COMMENT, tokenize.STRING) and marks.search(token.string)
    ]


def vague_names(modules: list[Module]) -> list[str]:
    return [module.name for module in modules if VAGUE & set(module.name.split("."))]


# The project obeys them; made-up code that breaks one is found.

BATCH, DATABASE, CLI = (
    "batch_system.batch.ledger.runs",
    "batch_system.database.engine",
    "batch_system.cli",
)


def broken(name: str, text: str, *others: str) -> list[Module]:
    return [Module(name, text), *(Module(other, "") for other in others)]


CASES: list[tuple[Rule, list[Module]]] = [
    (
        imports_that_point_up,
        broken(
            BATCH, "from batch_system.web import api", "batch_system.web", "batch_system.web.api"
        ),
    ),
    (imports_that_point_up, broken(BATCH, "from batch_system import cli", CLI)),
    (
        imports_that_point_up,
        broken(BATCH, "def f():\n    import batch_system.app", "batch_system.app"),
    ),
    (
        imports_that_point_up,
        broken(DATABASE, "from batch_system.batch.ledger.runs import get", BATCH),
    ),
    (imports_that_point_up, broken(DATABASE, "from ..batch.ledger import runs", BATCH)),
    (
        imports_that_point_up,
        broken(
            BATCH,
            "from batch_system.backup.making import create",
            "batch_system.backup.making.create",
        ),
    ),
    (
        imports_that_point_up,
        broken(
            "batch_system.settings.reading",
            "from batch_system.database import get_db",
            "batch_system.database",
        ),
    ),
    (modules_without_a_room, broken("batch_system.helpers", "")),
    (modules_without_a_room, broken("batch_system.batch.helpers", "")),
    (
        imports_of_the_root_or_of_tasks,
        broken(BATCH, "from batch_system import BaseTask", "batch_system"),
    ),
    (imports_of_the_root_or_of_tasks, broken(BATCH, "from batch_system import *", "batch_system")),
    (imports_of_the_root_or_of_tasks, broken(BATCH, "import batch_system", "batch_system")),
    (
        imports_of_the_root_or_of_tasks,
        broken(BATCH, "from tasks.backup import BackupTask", "tasks.backup"),
    ),
    (
        cycles,
        [
            Module("batch_system.a", "from batch_system import b"),
            Module("batch_system.b", "import batch_system.a"),
        ],
    ),
    (
        cycles,
        [
            Module("batch_system.a", "import batch_system.b.c"),
            Module("batch_system.b.c", "def f():\n from batch_system.a import x"),
        ],
    ),
    (
        folders_that_import_each_other,
        [
            Module("batch_system.a.one.x", "from batch_system.a.two import y"),
            Module("batch_system.a.two.y", "def f():\n from batch_system.a.one import z"),
            Module("batch_system.a.one.z", ""),
        ],
    ),
    (
        folders_that_import_each_other,
        [
            Module("batch_system.a.x", "from batch_system.a.inner import y"),
            Module("batch_system.a.inner.y", "import batch_system.a.z"),
            Module("batch_system.a.z", ""),
        ],
    ),
    (
        imports_that_point_up,
        broken(
            "batch_system.operations.runs.late",
            "from batch_system.operations.night import results",
            "batch_system.operations.night.results",
        ),
    ),
    (foreign_apscheduler, broken("batch_system.server.service", "import apscheduler")),
    (
        foreign_apscheduler,
        broken("batch_system.server.service", "from apscheduler.x import S\nS()"),
    ),
    (
        foreign_apscheduler,
        broken("batch_system.server.service", "from apscheduler.x import S\nclass T(S): ..."),
    ),
    (
        foreign_libraries,
        broken("batch_system.batch.firing.misfires", "from cronsim import CronSim"),
    ),
    (
        impure_imports,
        broken(
            "batch_system.batch.firing.misfires",
            "from batch_system import clock",
            "batch_system.clock",
        ),
    ),
    (impure_imports, broken("batch_system.batch.cron.cron", "from sqlalchemy import select")),
    (clock_reads, broken(BATCH, "import time")),
    (clock_reads, broken(BATCH, "from time import monotonic")),
    (clock_reads, broken(BATCH, "datetime.now(UTC)")),
    (clock_reads, broken(BATCH, "import datetime as dt\ndt.datetime.utcnow()")),
    (clock_reads, broken("tasks.report", "date.today()")),
    (clock_reads, broken(BATCH, "asyncio.get_running_loop().time()")),
    (environment_reads, broken(BATCH, "import os\nos.environ['X']")),
    (environment_reads, broken(BATCH, "import os\nos.getenv('X')")),
    (environment_reads, broken(BATCH, "from os import environ")),
    (environment_reads, broken("batch_system.clock", "import os\nzone = os.environ.get('TZ')")),
    (long_modules, broken(BATCH, "\n" * (MOST_LINES + 1))),
    (long_functions, broken(BATCH, "def f():\n" + "    x = 1\n" * (MOST_BODY_LINES + 1))),
    (prints, broken("batch_system.cli.runs", "print(name)")),
    (prints, broken(BATCH, "import sys\nsys.stderr.write(name)")),
    (left_for_later, broken(BATCH, "x = 1  # TODO: better")),
    (left_for_later, broken(BATCH, '"""FIXME"""')),
    (vague_names, broken("batch_system.batch.utils", "")),
    (vague_names, broken("batch_system.core.runs", "")),
]

RULES = [*dict.fromkeys(rule for rule, _ in CASES), broad_excepts]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project_has_none_of_these(project: list[Module], rule: Rule) -> None:
    assert rule(project) == []


@pytest.mark.parametrize(("rule", "modules"), CASES)
def test_a_module_that_breaks_a_rule_is_found(rule: Rule, modules: list[Module]) -> None:
    assert rule(modules)


@pytest.mark.parametrize(
    "handler",
    ["except Exception: pass", "except (ValueError, BaseException): pass", "except: pass"],
)
def test_a_broad_except_in_a_new_place_is_found(handler: str) -> None:
    found = broad_excepts([Module("batch_system.batch.ledger.schedules", f"try: ...\n{handler}")])
    assert "batch_system.batch.ledger.schedules: 1, allowed 0" in found


def test_a_suppress_of_everything_counts_as_a_broad_except() -> None:
    found = broad_excepts(
        [Module("batch_system.batch.ledger.schedules", "with contextlib.suppress(Exception): ...")]
    )
    assert "batch_system.batch.ledger.schedules: 1, allowed 0" in found


def test_one_broad_except_more_in_an_allowed_place_is_found_and_one_less_too() -> None:
    two = Module("batch_system.concurrency.thread_pool", "try: ...\nexcept Exception: ...\n" * 2)
    assert "batch_system.concurrency.thread_pool: 2, allowed 1" in broad_excepts([two])
    assert "batch_system.concurrency.thread_pool: 0, allowed 1" in broad_excepts(
        [Module("batch_system.concurrency.thread_pool", "")]
    )


def test_an_error_that_is_raised_again_was_not_caught() -> None:
    module = Module(
        "batch_system.batch.ledger.schedules",
        "try: ...\nexcept BaseException:\n    close()\n    raise",
    )
    assert not any(found.startswith(module.name) for found in broad_excepts([module]))


ALLOWED: list[tuple[Rule, list[Module]]] = [
    (imports_that_point_up, broken(CLI, "from batch_system.batch.ledger import runs", BATCH)),
    (
        imports_that_point_up,
        broken(
            BATCH, "from batch_system import clock, logs", "batch_system.clock", "batch_system.logs"
        ),
    ),
    (
        imports_that_point_up,
        broken("batch_system.logs", "from batch_system import clock", "batch_system.clock"),
    ),
    (
        imports_of_the_root_or_of_tasks,
        broken(BATCH, "from batch_system import clock", "batch_system", "batch_system.clock"),
    ),
    (cycles, broken(BATCH, "from batch_system import clock", "batch_system.clock")),
    (
        foreign_apscheduler,
        broken(
            "batch_system.server.service",
            "from apscheduler.x import S\ndef f(s: S) -> S | None: ...",
        ),
    ),
    (
        clock_reads,
        broken(BATCH, "from batch_system import clock\nclock.now()", "batch_system.clock"),
    ),
    (clock_reads, broken(BATCH, "from datetime import time\nwall.time()")),
    (environment_reads, broken(BATCH, "import os\nos.getpid()")),
    (
        long_functions,
        broken(BATCH, 'def f():\n    """' + "\n" * MOST_BODY_LINES + '"""\n    x = 1\n'),
    ),
    (left_for_later, broken(BATCH, "todo = 1")),
]


@pytest.mark.parametrize(("rule", "modules"), ALLOWED)
def test_a_module_that_obeys_a_rule_is_not_found(rule: Rule, modules: list[Module]) -> None:
    assert rule(modules) == []


def wide_lines(name: str, text: str) -> list[str]:
    return [
        f"{name}:{number} has {len(line)} columns"
        for number, line in enumerate(text.splitlines(), start=1)
        if len(line) > MOST_COLUMNS_OF_TEMPLATES
    ]


def test_a_line_of_a_template_can_be_read_without_scrolling() -> None:
    templates = sorted((ROOT / "batch_system/pages/templates").glob("*.html"))
    assert len(templates) > 20
    assert [each for path in templates for each in wide_lines(path.name, path.read_text())] == []
    assert wide_lines("a.html", "x" * 161) == ["a.html:1 has 161 columns"]


@pytest.mark.parametrize("code", ["import batch_system", "import batch_system.cli"])
def test_a_bare_import_and_the_help_load_nothing_heavy(code: str) -> None:
    heavy = {
        "alembic",
        "apscheduler",
        "prometheus_client",
        "pydantic",
        "sqlalchemy",
        "starlette",
        "structlog",
    }
    heavy |= {"uvicorn"}
    shown = f"{code}; import sys; print(sorted({heavy} & sys.modules.keys()))"
    ran = subprocess.run(
        [sys.executable, "-c", shown], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert ran.stdout.strip() == "[]"


HEAVY = (
    "alembic apprise apscheduler cryptography distributed httpx mako opentelemetry "
    "prometheus_client rich starlette"
)


def test_what_a_file_of_tasks_imports_loads_no_library_that_only_the_service_needs() -> None:
    code = "from batch_system import BaseTask, get_db, get_logger; import sys; print(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert not set(HEAVY.split()) & set(ran.stdout.split())


LISTS = """
import sys
from contextlib import suppress
from batch_system.cli import main
sys.argv = ["batch", "runs"]
with suppress(SystemExit):
    main()
print(*sys.modules)
"""


def test_a_command_that_lists_loads_neither_migrations_nor_the_parts_of_a_service(
    tmp_path: Path,
) -> None:
    heavy = {
        "alembic",
        "mako",
        "apscheduler",
        "asyncpg",
        "httpx",
        "isal",
        "starlette",
        "structlog",
        "uvicorn",
    }
    ran = subprocess.run(
        [sys.executable, "-c", LISTS], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert "no runs match" in ran.stderr and not heavy & set(ran.stdout.split())


def test_the_root_package_names_what_type_checkers_see() -> None:
    text = (ROOT / "batch_system/__init__.py").read_text()
    seen = set(re.findall(r"import (\w+) as \1\b", text))
    assert seen == set(batch_system.__all__)
    assert all(getattr(batch_system, name) is not None for name in batch_system.__all__)
