from __future__ import annotations

import functools
import subprocess
import sys
from abc import abstractmethod
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

from batch_system import BaseTask, TaskRegistry
from batch_system.batch.tasks.discovery import load_tasks
from batch_system.errors import InvalidSetting, InvalidTask, UnknownTask
from batch_system.escaping import echoed

ROOT = Path(__file__).parents[2]


class Plain(BaseTask):
    """Do the plain thing.

    At length."""

    name = "plain"
    schedule = "0 * * * *"

    def run(self) -> None: ...


def made(**attributes: Any) -> type[BaseTask]:
    """A task class like Plain but for these attributes."""
    return type(
        "Made", (Plain,), {"__doc__": None, "__module__": __name__, "name": "made", **attributes}
    )


def refusal(cls: Any) -> str:
    with pytest.raises(InvalidTask) as caught:
        TaskRegistry.register(cls)
    return caught.value.message


def raises(error: BaseException) -> property:
    def read(_: Any) -> str:
        raise error

    return property(read)


def test_register_returns_the_class_so_it_decorates() -> None:
    assert TaskRegistry.register(Plain) is Plain
    assert TaskRegistry.get("plain").cls is Plain


def test_the_same_class_twice_is_one_task() -> None:
    TaskRegistry.register(Plain)
    TaskRegistry.register(Plain)
    assert TaskRegistry.get_all_tasks() == [Plain]


def test_tasks_are_kept_in_the_order_of_their_registration() -> None:
    second, first = made(name="a"), made(name="b")
    TaskRegistry.register(first)
    TaskRegistry.register(second)
    assert TaskRegistry.get_all_tasks() == [first, second]


def test_two_classes_with_one_name_are_an_error_that_names_both_files(tmp_path: Path) -> None:
    for stem in ("one", "two"):
        text = (
            "from batch_system import BaseTask\nclass {}(BaseTask):\n name = 'same'\n schedule = "
            "None\n def run(self): ..."
        )
        (tmp_path / "tasks" / f"{stem}.py").write_text(text.format(stem.title()))
    [broken] = load_tasks(Path("tasks"))
    assert broken.source == "tasks/two.py"
    assert (
        "two tasks are named 'same': One in tasks/one.py is used, and Two in tasks/two.py is not"
        in broken.error
    )
    assert TaskRegistry.get("same").source == "tasks/one.py"


@pytest.mark.parametrize("name", ["", "With Space", "Upper", "a" * 101, "a\n", "é", 7, None])
def test_an_invalid_name_is_refused_with_the_allowed_characters(name: Any) -> None:
    message = refusal(made(name=name))
    shown = "missing" if name is None else echoed(name)
    assert message.startswith(
        f"task class Made in {Path(__file__)}: name is {shown}; allowed: 1 to 100 of a-z 0-9 _ ."
    )


@pytest.mark.parametrize("name", ["a", "0", "a_b.c-d", "a" * 100])
def test_a_name_of_the_allowed_characters_is_accepted(name: str) -> None:
    TaskRegistry.register(made(name=name))
    assert TaskRegistry.get(name).name == name


def test_a_class_without_run_is_refused() -> None:
    class Idle(BaseTask):
        name = "idle"
        schedule = None

    assert "has no run()" in refusal(Idle)
    assert "has no run()" in refusal(made(run=None))


def test_an_abstract_class_is_refused_with_what_is_missing() -> None:
    class Half(Plain):
        @abstractmethod
        def fetch(self) -> None: ...

    assert "it is abstract: fetch is missing" in refusal(Half)


@pytest.mark.parametrize("thing", [Plain(), "plain", None])
def test_an_object_that_is_not_a_class_is_refused(thing: Any) -> None:
    assert refusal(thing) == f"a task must be a subclass of BaseTask, and {thing!r} is not a class"
    assert "not a subclass of BaseTask" in refusal(int)


def test_an_init_with_arguments_is_refused() -> None:
    def init(self: Any, dsn: str) -> None: ...

    assert "Made" in (message := refusal(made(__init__=init)))
    assert "can't be instantiated without arguments" in message and "'dsn'" in message


def test_an_init_that_raises_is_refused_with_its_error() -> None:
    def init(_: Any) -> None:
        raise KeyError("TOKEN")

    assert refusal(made(__init__=init)).endswith(
        "can't be instantiated without arguments: KeyError: 'TOKEN'"
    )


@pytest.mark.parametrize("attribute", ["name", "description", "schedule", "timezone"])
@pytest.mark.parametrize("error", [ZeroDivisionError("oh"), AttributeError("oh"), SystemExit("oh")])
def test_a_property_that_raises_is_refused_with_its_error(
    attribute: str, error: BaseException
) -> None:
    message = refusal(made(**{attribute: raises(error)}))
    assert message.endswith(f"{attribute} can't be read: {type(error).__name__}: oh")


def test_the_message_of_a_batch_error_in_a_property_is_kept() -> None:
    message = refusal(made(schedule=raises(InvalidSetting("setting PORT: too large"))))
    assert message.endswith("schedule can't be read: setting PORT: too large")


def test_attributes_may_be_properties() -> None:
    values = {
        "name": "prop",
        "description": "By property",
        "schedule": "5 4 * * *",
        "timezone": "Asia/Tokyo",
    }
    TaskRegistry.register(
        made(**{key: property(lambda _, v=value: v) for key, value in values.items()})
    )
    task = TaskRegistry.get("prop")
    assert task.schedule is not None
    assert (task.description, task.schedule.cron, task.schedule.timezone) == (
        "By property",
        "5 4 * * *",
        "Asia/Tokyo",
    )
    assert task.may_change and not TaskRegistry.get(TaskRegistry.register(Plain)().name).may_change


def test_a_property_is_read_again_from_a_new_instance() -> None:
    crons = iter(["0 1 * * *"] * 5 + ["0 2 * * *"] * 5)
    TaskRegistry.register(made(schedule=property(lambda _: next(crons))))
    seen = {
        schedule.cron for _ in range(6) if (schedule := TaskRegistry.get("made").read_schedule())
    }
    assert seen == {"0 1 * * *", "0 2 * * *"}


def test_the_default_description_is_the_first_line_of_the_docstring() -> None:
    for cls in (Plain, made(name="bare"), made(name="own", __doc__="No.", description="Yes")):
        TaskRegistry.register(cls)
    assert [task.description for task in TaskRegistry.tasks().values()] == [
        "Do the plain thing.",
        "",
        "Yes",
    ]
    assert "description is 5; allowed: a string" in refusal(made(description=5))


@pytest.mark.parametrize("cron", ["61 * * * *", "* * *", "nonsense", ""])
def test_an_invalid_cron_expression_is_refused_naming_class_and_file(cron: str) -> None:
    message = refusal(made(schedule=cron))
    assert (
        message.startswith(f"task class Made in {__file__}: ")
        and repr(cron) in message
        and "allowed" in message
    )


def test_an_unknown_time_zone_is_refused() -> None:
    assert "unknown time zone 'Mars/Base'" in refusal(made(timezone="Mars/Base"))
    assert "timezone is None; allowed: an IANA name such as" in refusal(made(timezone=None))


def test_a_missing_schedule_is_refused_and_none_is_not() -> None:
    class Timeless(BaseTask):
        name = "timeless"

        def run(self) -> None: ...

    assert "schedule is missing; allowed: a cron expression, or None" in refusal(Timeless)
    assert "schedule is 5; allowed: a cron expression such as '0 2 * * *', or None" in refusal(
        made(schedule=5)
    )
    TaskRegistry.register(made(schedule=None))
    assert TaskRegistry.get("made").schedule is None


def test_a_schedule_needs_defaults_for_every_parameter() -> None:
    def run(self: Any, day: date, dry_run: bool = False) -> None: ...

    assert "run() needs day, for which a scheduled run has no value" in refusal(made(run=run))
    TaskRegistry.register(made(run=run, schedule=None))
    assert TaskRegistry.get("made").parameters.names == ("day", "dry_run")


def test_tasks_that_declare_the_same_share_what_was_read() -> None:
    def run(self: Any, slot: datetime, day: str = "monday") -> None: ...

    plain = [TaskRegistry.of(made(name=name, timeout=None)) for name in ("one", "two")]
    alike = [
        TaskRegistry.of(made(name=name, timeout=1000, owner="me", run=run))
        for name in ("three", "four")
    ]
    other = TaskRegistry.of(made(name="five", timeout=2000, owner="you"))
    for first, second in (plain, alike):
        assert first.policies is second.policies and first.monitoring is second.monitoring
        assert first.parameters.json_schema() is second.parameters.json_schema()
    assert (alike[0].policies.timeout, other.policies.timeout, plain[0].policies.timeout) == (
        1000,
        2000,
        None,
    )
    assert (alike[0].monitoring.owner, other.monitoring.owner, plain[0].monitoring.owner) == (
        "me",
        "you",
        None,
    )
    assert alike[0].monitoring.each_slot_counts and not plain[0].monitoring.each_slot_counts


def test_the_parameter_slot_needs_no_default() -> None:
    def run(self: Any, slot: datetime) -> None: ...

    TaskRegistry.register(made(run=run))
    assert TaskRegistry.get("made").parameters.takes_slot


def test_a_run_with_a_yield_is_refused() -> None:
    def generator(self: Any) -> Any:
        yield

    async def async_generator(self: Any) -> Any:
        yield

    assert "yield" in refusal(made(run=generator)) and "yield" in refusal(made(run=async_generator))


def test_a_policy_on_the_instance_is_refused() -> None:
    def init(self: Any) -> None:
        self.timeout = 5

    assert "timeout is set on the instance; allowed: a class attribute" in refusal(
        made(__init__=init)
    )


def behind_a_plain_decorator(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def test_only_a_coroutine_function_runs_on_the_loop() -> None:
    async def run(self: Any, n: int = 1) -> None: ...

    for name, function in (
        ("async", run),
        ("sync", Plain.run),
        ("decorated", behind_a_plain_decorator(run)),
    ):
        TaskRegistry.register(made(name=name, run=function))
    assert [task.on_loop for task in TaskRegistry.tasks().values()] == [True, False, False]
    assert TaskRegistry.get("decorated").parameters.names == ("n",)


def test_an_unknown_name_is_an_error_that_lists_the_names() -> None:
    TaskRegistry.register(Plain)
    with pytest.raises(
        UnknownTask,
        match=r"no task is named 'plane' \(did you mean plain\?\); the tasks are: plain",
    ):
        TaskRegistry.get("plane")


AUTHOR = """
from __future__ import annotations
from datetime import date, datetime, timedelta
from batch_system import BaseTask, Missed, Retry, TaskRegistry, current_run
from batch_system import get_logger, get_settings
from batch_system import create_scheduler, start_scheduler, stop_scheduler

logger = get_logger(__name__)

@TaskRegistry.register
class Sync(BaseTask):
    name = "sync"
    description = "By attributes"
    schedule = "0 * * * *"
    timezone = "Asia/Tokyo"
    retry = Retry(attempts=3, on=(ValueError,))
    missed = Missed("all", max_age=timedelta(days=2))
    timeout = timedelta(minutes=1)
    overlap = "allow"

    def run(self, day: date | None = None, dry_run: bool = False) -> dict[str, int]:
        logger.info("working", day=day)
        return {"seen": current_run().attempt}

class Async(BaseTask):
    name = "async"
    timeout = 5

    @property
    def description(self) -> str:
        return "By properties"

    @property
    def schedule(self) -> str:
        return get_settings().CUSTOM_TASK_CRON

    async def run(self, slot: datetime) -> None: ...

class Manual(BaseTask):
    name = "manual"
    schedule = None

    async def run(self, n: int) -> int:
        return n

registered: type[Async] = TaskRegistry.register(Async)

async def main() -> int:
    scheduler = create_scheduler()
    start_scheduler(scheduler)
    await stop_scheduler(scheduler)
    return await Manual().run(n=1)
"""


@pytest.mark.types
def test_authors_code_passes_mypy_strict(tmp_path: Path) -> None:
    (tmp_path / "author.py").write_text(AUTHOR)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-error-summary",
        "--cache-dir",
        ROOT / ".mypy_cache",
    ]
    checked = subprocess.run(
        [*command, tmp_path / "author.py"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (checked.returncode, checked.stdout) == (0, "")
