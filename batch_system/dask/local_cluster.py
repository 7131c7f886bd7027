"""A Dask cluster on this machine: a scheduler in this process, and worker processes beside it."""

from __future__ import annotations

import importlib.util
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dask
from distributed import LocalCluster

from batch_system.errors import InvalidParameters

DASHBOARD_PORT = 8787
KEEPS_NANNIES = {"distributed.deploy.lost-worker-timeout": "24 h"}
"""The cluster ends the nanny of a worker that has been lost for this time. With Dask's 15 seconds,
it could end a nanny that is just restarting its killed worker on a busy machine, and have one
worker less from then on.
"""


@dataclass(frozen=True)
class Shape:
    """A cluster of one machine. `places`: how many runs each worker executes at once. `port`: 0 for
    a free one.
    """

    host: str
    port: int
    workers: int
    places: int


def run(shape: Shape, on_ready: Callable[[str, str | None], None]) -> None:
    """Run the cluster until SIGTERM, SIGINT or SIGHUP (unless nohup has it ignored), which drains
    its workers.

    `on_ready` is called with the address of the scheduler and that of its dashboard; the latter is
    None if bokeh, which the dashboard needs, is not installed. Raises InvalidParameters if the port
    is taken or the host is not this machine.
    """
    asked = threading.Event()
    is_hang_up_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = (signal.SIGTERM, signal.SIGINT, *(() if is_hang_up_ignored else (signal.SIGHUP,)))
    before = {number: signal.signal(number, lambda *_: asked.set()) for number in numbers}
    try:
        with dask.config.set(KEEPS_NANNIES), _started(shape) as cluster:
            has_dashboard = importlib.util.find_spec("bokeh") is not None
            on_ready(cluster.scheduler_address, cluster.dashboard_link if has_dashboard else None)
            asked.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _started(shape: Shape) -> Any:
    new: Any = LocalCluster
    try:
        return new(
            host=shape.host,
            scheduler_port=shape.port,
            n_workers=shape.workers,
            threads_per_worker=shape.places,
            dashboard_address=f"{shape.host}:{DASHBOARD_PORT}",
        )
    except (OSError, RuntimeError) as error:
        cause = error.__cause__ or error
        raise InvalidParameters(
            f"no Dask scheduler can listen on {shape.host}:{shape.port}: "
            f"{str(cause).splitlines()[0]}"
        ) from error
