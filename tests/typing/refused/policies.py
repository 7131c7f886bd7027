"""Mistakes in what a task says beside its code. Both checkers report each line that is marked, and
no other.
"""

from datetime import timedelta

from batch_system import BaseTask, Missed, Retry


class Attributes(BaseTask):
    name = 5  # refused
    description = None  # refused
    schedule = 5  # refused
    timezone = timedelta(hours=9)  # refused
    timeout = "5"  # refused
    retry = 3  # refused
    overlap = "sometimes"  # refused
    max_running = "2"  # refused
    max_waiting = None  # refused
    missed = "twice"  # refused
    priority = "high"  # refused

    async def run(self) -> None: ...


class Properties(BaseTask):
    @property
    def name(self) -> int:  # refused
        return 5

    @property
    def schedule(self) -> list[str]:  # refused
        return ["0 * * * *"]

    async def run(self) -> None: ...


class Policies(BaseTask):
    name = "policies"
    schedule = None

    def run(self) -> None:
        self.retry = Retry()  # refused
        Retry(attempts="3")  # refused
        Retry(wait="1m")  # refused
        Retry(on="ValueError")  # refused
        Retry(on=(int,))  # refused
        Retry(tries=3)  # refused
        Retry(attempts=2).attempts = 3  # refused
        Missed("twice")  # refused
        Missed("all", max_age=3600)  # refused
        Missed(max_count=1.5)  # refused


class WithoutRun(BaseTask):
    name = "without_run"
    schedule = None


WithoutRun()  # refused
