"""A Dask cluster in a process of its own, with worker processes: `python -m tests.dask.cluster
WORKERS PLACES`.

It prints the address of its scheduler, and runs until it is killed.
"""

from __future__ import annotations

import signal
import sys

import dask
from distributed import LocalCluster

try:
    from batch_system.dask.local_cluster import KEEPS_NANNIES
except ImportError:  # a test has the workers use an older `service`
    KEEPS_NANNIES = {}

if __name__ == "__main__":
    workers, places = map(int, sys.argv[1:3])
    dask.config.set(KEEPS_NANNIES)
    with LocalCluster(
        n_workers=workers, threads_per_worker=places, dashboard_address=None
    ) as cluster:
        print(cluster.scheduler_address, flush=True)
        while True:
            signal.pause()
