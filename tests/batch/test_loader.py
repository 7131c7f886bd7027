from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from batch_system import TaskRegistry, failures, logs
from batch_system.batch.tasks.broken_files import BrokenFile
from batch_system.batch.tasks.discovery import load_tasks
from batch_system.errors import InvalidSetting

HEAD = "from batch_system import BaseTask, Retry, TaskRegistry, get_settings\n"


def task(name: str, cls: str = "Made", body: str = "") -> str:
    return (
        f"class {cls}(BaseTask):\n    name = {name!r}\n    schedule = None\n    def run(self): "
        f"{body or 'pass'}\n"
    )


def write(**files: str) -> None:
    for stem, text in files.items():
        Path("tasks", f"{stem}.py").write_text(HEAD + text)


def load() -> list[BrokenFile]:
    return load_tasks(Path("tasks"))


def loaded() -> list[str]:
    return list(TaskRegistry.tasks())


UNREADABLE = """
from batch_system import BaseTask
class Unreadable(Exception):
    def __str__(self):
        raise ZeroDivisionError
"""


def test_a_file_whose_error_can_t_be_formatted_is_reported_and_the_others_run() -> None:
    write(
        good="from batch_system import BaseTask\nclass Good(BaseTask):\n name, schedule = 'good', "
        "None\n def run(self): ...",
        raising=f"{UNREADABLE}raise Unreadable",
        endless="raise ValueError('x' * 10_000_000)",
        property=f"{UNREADABLE}class Odd(BaseTask):\n name = 'odd'\n def run(self): ...\n"
        " @property\n def schedule(self):\n  raise Unreadable",
    )
    broken = {Path(file.source).stem: file for file in load()}
    assert loaded() == ["good"] and broken.keys() == {"raising", "endless", "property"}
    assert all("its text can't be read" in broken[name].error for name in ("raising", "property"))
    assert all(len(file.error) + len(file.traceback) < 50_000 for file in broken.values())


def test_a_concrete_task_registers_itself() -> None:
    write(one=task("one"))
    assert load() == []
    assert loaded() == ["one"]


def test_explicit_and_automatic_registration_make_one_task() -> None:
    write(one=task("one") + "TaskRegistry.register(Made)\n")
    assert load() == []
    assert loaded() == ["one"]


def test_loading_twice_changes_nothing() -> None:
    write(one=task("one"))
    first, classes = load(), TaskRegistry.get_all_tasks()
    assert (first, load()) == ([], [])
    assert TaskRegistry.get_all_tasks() == classes


def test_tasks_register_in_the_order_of_the_file_names() -> None:
    write(b=task("first"), a=task("second"), c=task("third") + task("fourth", "Other"))
    load()
    assert loaded() == ["second", "first", "third", "fourth"]


def test_abstract_classes_and_underscored_names_do_not_register_themselves() -> None:
    write(
        base="from abc import abstractmethod\n"
        + task("private", "_Private")
        + "class Abstract(_Private):\n    @abstractmethod\n    def fetch(self): ...\n"
        + "class Concrete(Abstract):\n    name = 'concrete'\n    def fetch(self): ...\n",
        _hidden=task("hidden"),
    )
    assert load() == []
    assert loaded() == ["concrete"]


def test_a_class_whose_run_is_misspelled_is_no_task_and_is_reported_and_logged() -> None:
    stream = StringIO()
    logs.set_up(stream=stream)
    write(typo=task("typo").replace("def run", "def rnu"), good=task("good", "Good"))
    [file] = load()
    assert loaded() == ["good"]
    assert (file.source, file.task) == ("tasks/typo.py", "typo")
    assert file.error == "class Made has a name and no run(), so it is no task"
    logs.flush()
    assert f"tasks/typo.py can't be used: {file.error}" in stream.getvalue()


def test_a_traceback_shows_the_lines_that_were_executed_though_the_file_has_changed() -> None:
    write(old=task("old") + "\ndef fail():\n    raise ValueError('the old line')\n")
    assert load() == []
    write(old="# another line\n" * 40)
    with pytest.raises(ValueError, match="the old line") as caught:
        sys.modules["tasks.old"].fail()
    told = failures.traceback_of(caught.value)
    assert "raise ValueError('the old line')" in told and "another line" not in told


def test_an_imported_task_belongs_to_the_file_that_defines_it() -> None:
    write(a="from tasks.order_b import Made\n" + task("a", "Own"), order_b=task("b"))
    assert load() == []
    assert {t.name: t.source for t in TaskRegistry.tasks().values()} == {
        "a": "tasks/a.py",
        "b": "tasks/order_b.py",
    }


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("import no_such_thing", "ModuleNotFoundError in line 2: No module named 'no_such_thing'"),
        ("\nx = (", "SyntaxError in line 3: '(' was never closed"),
        ("raise SystemExit(3)", "SystemExit in line 2: 3"),
        ("{}['key']", "KeyError in line 2: 'key'"),
        ("raise ValueError('first\\nsecond')", "ValueError in line 2: first"),
        (
            "class Odd(BaseTask):\n  retry = Retry(attempts=0)",
            "Retry(attempts) is 0; allowed: an int from 1 (in line 3)",
        ),
    ],
)
def test_a_file_that_does_not_import_is_reported_and_the_others_run(text: str, error: str) -> None:
    write(a=task("before"), b=text, c=task("after"))
    [broken] = load()
    assert (broken.source, broken.error) == ("tasks/b.py", error)
    assert "tasks/b.py" in broken.traceback
    assert loaded() == ["before", "after"]


def test_a_broken_file_is_logged_with_its_traceback_and_without_the_import_machinery() -> None:
    stream = StringIO()
    logs.set_up(stream=stream)
    write(bad="def broken():\n    1 / 0\nbroken()")
    load()
    logs.flush()
    assert (
        "tasks/bad.py can't be used: ZeroDivisionError in line 3: division by zero"
        in stream.getvalue()
    )
    assert "in broken\n        1 / 0" in stream.getvalue() and "importlib" not in stream.getvalue()


def test_the_tasks_of_a_file_that_failed_are_forgotten() -> None:
    write(half=task("half") + "TaskRegistry.register(Made)\n1 / 0")
    assert len(load()) == 1
    assert loaded() == []


def test_a_file_that_was_corrected_is_imported_again() -> None:
    write(mended="1 / 0")
    assert len(load()) == 1
    write(mended=task("mended"))
    assert (load(), loaded()) == ([], ["mended"])


def test_an_invalid_class_does_not_prevent_the_others_of_its_file() -> None:
    head = "class {}(BaseTask):\n    name = 'bad'\n    def run(self): ...\n"
    init = head.format("Bad") + "    schedule = None\n    def __init__(self): {}['x']\n"
    missing = head.format("Dynamic") + "    schedule = property(lambda _: get_settings().NO_CRON)\n"
    write(mixed=init + missing + task("good"))
    errors = [broken.error for broken in load()]
    assert [error.split(":")[0] for error in errors] == [
        "task class Bad in tasks/mixed.py",
        "task class Dynamic in tasks/mixed.py",
    ]
    assert "schedule can't be read: AttributeError: there is no setting NO_CRON" in errors[1]
    assert loaded() == ["good"]


def test_two_files_that_import_each_other_see_the_same_classes() -> None:
    write(
        twin_a=task("a", "A"),
        twin_b="from tasks import twin_a\nfrom .twin_a import A\n" + task("b", "B", "return A"),
    )
    assert load() == []
    assert TaskRegistry.get("b").cls().run() is TaskRegistry.get("a").cls


def test_a_folder_and_files_whose_names_are_no_identifiers_are_loaded() -> None:
    odd = Path("my-tasks.v2")
    odd.mkdir()
    (odd / "_part.py").write_text("NAME = 'odd'\n")
    (odd / "2024.my-report.py").write_text(HEAD + "from ._part import NAME\n" + task("odd"))
    assert load_tasks(odd) == []
    assert TaskRegistry.get("odd").source == "my-tasks.v2/2024.my-report.py"


def test_a_missing_folder_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(InvalidSetting, match=r"setting TASKS_DIR: there is no folder 'nowhere'"):
        load_tasks(Path("nowhere"))


SEVERAL = """
from pathlib import Path
from batch_system import TaskRegistry
from batch_system.batch.tasks.discovery import load_tasks
print(load_tasks(Path("tasks")), [t.cls().run() for t in TaskRegistry.tasks().values()])
"""


@pytest.mark.parametrize("init", [None, "HERE = 1\n"])
def test_the_files_of_the_folder_are_found_although_another_package_tasks_is_installed(
    init: str | None,
) -> None:
    """In a process of its own, as `batch` starts: with this project's tasks/ on the path, and not
    the folder.
    """
    if init is not None:
        Path("tasks/__init__.py").write_text(init)
    Path("tasks/_shared.py").write_text("VALUE = 'mine'\n")
    write(one="from tasks._shared import VALUE\n" + task("one", body="return VALUE"))
    write(two="from ._shared import VALUE\n" + task("two", body="return VALUE"))
    path = f"import sys; sys.path[:1] = [{str(Path(__file__).parents[2])!r}]\n"
    done = subprocess.run(
        [sys.executable, "-c", path + SEVERAL], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[] ['mine', 'mine']\n"


# In a package, and by the name of one.

MODELS = "class Customer:\n    title = 'a customer'\n"
IN_PACKAGE = (
    HEAD + "from ..models import Customer\n" + task("relative", "Relative", "return Customer.title")
)
BESIDE = HEAD + "from myapp.tasks.a import Relative\n" + task("beside", "Beside", "return Relative")


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test imports is forgotten after it."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def myapp(tmp_path: Path, imports: None) -> Path:
    """A package `myapp` in a folder `src`, with tasks in `myapp/tasks`."""
    package = tmp_path / "src" / "myapp"
    (package / "tasks").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "tasks" / "__init__.py").touch()
    (package / "models.py").write_text(MODELS)
    (package / "tasks" / "a.py").write_text(IN_PACKAGE)
    (package / "tasks" / "b.py").write_text(BESIDE)
    return package


def run_of(name: str) -> Any:
    return TaskRegistry.get(name).cls().run()


@pytest.mark.parametrize("is_absolute", [True, False])
@pytest.mark.parametrize("has_init", [True, False])
def test_a_folder_in_a_package_is_imported_once(
    myapp: Path, is_absolute: bool, has_init: bool
) -> None:
    if not has_init:
        (myapp / "tasks" / "__init__.py").unlink()
    assert load_tasks(myapp / "tasks" if is_absolute else Path("src/myapp/tasks")) == []
    assert {t.name: t.cls.__module__ for t in TaskRegistry.tasks().values()} == {
        "relative": "myapp.tasks.a",
        "beside": "myapp.tasks.b",
    }
    assert run_of("relative") == "a customer"
    assert run_of("beside") is TaskRegistry.get("relative").cls
    import myapp.tasks.a  # type: ignore[import-not-found]

    assert myapp.tasks.a.Relative is TaskRegistry.get("relative").cls


def test_modules_that_the_application_had_imported_are_not_imported_again(myapp: Path) -> None:
    sys.path.insert(0, str(myapp.parent))
    before = import_module("myapp.tasks.a")
    assert load_tasks(Path("src/myapp/tasks")) == []
    assert TaskRegistry.get("relative").cls is before.Relative


def test_a_package_behind_a_symbolic_link_is_not_imported_again(myapp: Path) -> None:
    Path("link").symlink_to(myapp.parent, target_is_directory=True)
    sys.path.insert(0, str(Path("link").absolute()))
    before = import_module("myapp.tasks.a")
    assert load_tasks(Path("link/myapp/tasks")) == []
    assert TaskRegistry.get("relative").cls is before.Relative


@pytest.mark.parametrize("has_init", [True, False])
@pytest.mark.parametrize("is_here", [True, False])
def test_a_package_is_found_by_its_name(myapp: Path, has_init: bool, is_here: bool) -> None:
    if not has_init:
        for file in myapp.rglob("__init__.py"):
            file.unlink()
    if is_here:
        myapp.rename("myapp")
    else:
        sys.path.insert(0, str(myapp.parent))
    assert load_tasks(Path("myapp.tasks")) == []
    assert {t.name: t.source for t in TaskRegistry.tasks().values()} == {
        "relative": f"{'' if is_here else 'src/'}myapp/tasks/a.py",
        "beside": f"{'' if is_here else 'src/'}myapp/tasks/b.py",
    }
    assert run_of("relative") == "a customer"
    assert run_of("beside") is TaskRegistry.get("relative").cls


def test_a_folder_of_a_dotted_name_wins_over_a_package(myapp: Path) -> None:
    sys.path.insert(0, str(myapp.parent))
    Path("myapp.tasks").mkdir()
    Path("myapp.tasks", "a.py").write_text(HEAD + task("of_the_folder"))
    assert load_tasks(Path("myapp.tasks")) == []
    assert loaded() == ["of_the_folder"]


def test_the_working_directory_is_no_package_even_with_an_init(imports: None) -> None:
    Path("__init__.py").touch()
    write(_part_of_it="VALUE = 'mine'\n")
    write(one="from tasks._part_of_it import VALUE\n" + task("one", body="return VALUE"))
    assert load() == []
    assert run_of("one") == "mine"
    assert TaskRegistry.get("one").cls.__module__.startswith("tasks.one")


def test_an_error_in_a_package_around_the_tasks_is_reported_and_tasks_that_do_not_need_it_run(
    myapp: Path,
) -> None:
    (myapp / "__init__.py").write_text("\n1 / 0\n")
    (myapp / "tasks" / "c.py").write_text(HEAD + task("apart"))
    broken = {file.source: file.error for file in load_tasks(Path("src/myapp/tasks"))}
    assert broken["src/myapp/__init__.py"] == "ZeroDivisionError in line 2: division by zero"
    assert "apart" in loaded()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("jobs", "there is no folder 'jobs' in "),
        ("json", "there is no folder 'json' in "),
        ("no.such", "there is neither a folder 'no.such' in "),
        ("myapp.jobs", "there is neither a folder 'myapp.jobs' in "),
        (
            "myapp.models",
            "'myapp.models' is a module (src/myapp/models.py); allowed: a package, which is a "
            "folder",
        ),
        ("myapp.models.x", "there is neither a folder 'myapp.models.x' in "),
        ("src/myapp/models.py", "'src/myapp/models.py' is a file; allowed: a folder"),
        ("src/jobs", "there is no folder 'src/jobs' in "),
        ("myapp..tasks", "there is no folder 'myapp..tasks' in "),
    ],
)
def test_a_place_that_is_no_folder_or_package_is_an_error_that_says_what_it_is(
    myapp: Path, name: str, reason: str
) -> None:
    sys.path.insert(0, str(myapp.parent))
    with pytest.raises(InvalidSetting) as raised:
        load_tasks(Path(name))
    assert raised.value.message.startswith(f"setting TASKS_DIR: {reason}")
