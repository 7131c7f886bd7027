"""What workers call in place of `batch_system.server.dask_node`: it offers a task, whose tickets
wait for the test.
"""

from __future__ import annotations

import threading

from distributed import Worker, WorkerPlugin

from batch_system.dask import resources

may_end = threading.Event()


class Offers(WorkerPlugin):
    async def setup(self, worker: Worker) -> None:
        await worker.set_resources(**resources.offered({"cpu": ["a"]}, worker.state.nthreads, None))


def plugin(pools: list[str]) -> Offers:
    return Offers()


def use(task: str, seconds: float, by: str) -> bool:
    if task == "a" and not may_end.wait(10):
        raise TimeoutError
    return False
