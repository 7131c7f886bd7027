"""Every way to say when, how long, how often."""

from abc import abstractmethod
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import wraps
from typing import Any, ClassVar, Generic, ParamSpec, TypeVar, assert_type

from app_settings import AppSettings

from batch_system import BaseTask, Retry, TaskRegistry, get_logger, get_settings

logger = get_logger()

P = ParamSpec("P")
R = TypeVar("R")
Row = TypeVar("Row")


class FromASetting(BaseTask):
    """A schedule that is a property, of a key that only this author knows."""

    name = "from_a_setting"
    timeout = 2.5
    missed = "all"
    overlap = "wait"
    max_running = 2
    max_waiting = 3
    retry = Retry(attempts=2, wait=0.5, on=ValueError)

    @property
    def schedule(self) -> str:
        return getattr(get_settings(), "NIGHTLY_CRON", "30 3 * * *")

    async def run(self) -> None:
        assert_type(get_settings().NIGHTLY_CRON, str)
        assert_type(get_settings().MAX_RUNNING, int)


class FromTypedSettings(BaseTask):
    """Everything that may be a property is one."""

    timeout = 5
    overlap = "replace"
    retry = Retry(3, on=[OSError, ValueError])
    missed = "once"

    @property
    def name(self) -> str:
        return "from_typed_settings"

    @property
    def description(self) -> str:
        return "To " + ", ".join(get_settings(AppSettings).REPORT_RECIPIENTS)

    @property
    def schedule(self) -> str | None:
        settings = assert_type(get_settings(AppSettings), AppSettings)
        return settings.REPORT_CRON or None

    @property
    def timezone(self) -> str:
        return "Asia/Tokyo"

    def run(self) -> int:
        logger.warning(f"{self.name.upper()} of {self.timezone.split('/')}", cron=self.schedule)
        return len(assert_type(get_settings(AppSettings).REPORT_RECIPIENTS, list[str]))


class ByHand(BaseTask):
    name = "by_hand"
    schedule = None
    timeout = None
    overlap = "skip"

    def run(self, words: list[str] | None = None, *, often: int = 1) -> list[str]:
        return (words or []) * often


class _Import(BaseTask, Generic[Row]):
    """A base of the author's: what differs is left to the tasks below it."""

    timezone = "Europe/Berlin"
    timeout: ClassVar[float | timedelta | None] = 60.0
    retry = Retry(attempts=3)

    @abstractmethod
    async def rows(self) -> list[Row]: ...

    @abstractmethod
    def save(self, row: Row) -> None: ...

    async def run(self, limit: int = 100) -> int:
        for row in (await self.rows())[:limit]:
            self.save(row)
        return limit


class ImportNumbers(_Import[int]):
    name = "import_numbers"
    schedule = "@daily"
    timeout = timedelta(minutes=2)

    async def rows(self) -> list[int]:
        return [1, 2]

    def save(self, row: int) -> None:
        logger.debug("saved", row=row)


class ImportNames(_Import[str]):
    name = "import_names"
    schedule = None

    async def rows(self) -> list[str]:
        return ["a"]

    def save(self, row: str) -> None: ...

    async def run(self, limit: int = 10, upper: bool = False) -> int:
        return await super().run(limit) + upper


def logged(run: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
    @wraps(run)
    async def with_log(*args: P.args, **kwargs: P.kwargs) -> R:
        logger.info("begins")
        return await run(*args, **kwargs)

    return with_log


class Decorated(BaseTask):
    name = "decorated"
    schedule = "0 0 L * *"

    @logged
    async def run(self, number: int = 1) -> int:
        return number


class Made(BaseTask):
    """A task that is made with what it needs."""

    name = "made"
    schedule = "*/5 * * * *"

    def __init__(self, factor: int = 2) -> None:
        self.factor = factor

    def run(self, **anything: Any) -> int:
        return self.factor


assert_type(TaskRegistry.register(Made), type[Made])
