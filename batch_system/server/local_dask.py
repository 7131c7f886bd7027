"""`batch work --dask`: a Dask cluster on this machine, where services execute the runs of pools."""

from __future__ import annotations

import os
from collections.abc import Collection
from urllib.parse import urlsplit

from batch_system import console, logs
from batch_system.errors import InvalidParameters
from batch_system.settings.pools import DASK_PORT, PREFIX
from batch_system.settings.settings import Settings

PLACES = 4
"""How many runs each worker executes at once, unless `--max-running` is given."""


def run(
    settings: Settings, pools: Collection[str], workers: int | None, places: int | None
) -> None:
    """Run a cluster until SIGTERM, SIGINT or SIGHUP. Raises BatchError if it can't start.

    `pools`: those whose setting names its address; if empty, all pools on Dask. `workers`: by
    default one for each core.
    """
    from batch_system.dask import installed

    installed.load("--dask")
    from batch_system.dask import local_cluster

    logs.set_up(settings.LOG_LEVEL, settings.LOG_FORMAT)
    named, (host, port) = _address(settings, pools)
    shape = local_cluster.Shape(host, port, workers or os.cpu_count() or 1, places or PLACES)

    def on_ready(address: str, dashboard: str | None) -> None:
        console.say(
            f"Dask on this machine: {shape.workers} workers, {shape.places} places each", flush=True
        )
        console.say(f"  scheduler  {address.replace('tcp:', 'dask:', 1)}", flush=True)
        shown = dashboard or "none: it needs bokeh (pip install 'bokeh>=3.1')"
        console.say(f"  dashboard  {shown}", flush=True)
        if named:
            console.say(f"  pools      {', '.join(named)}", flush=True)
        else:
            setting = f"{PREFIX}{(min(pools) if pools else 'cpu').upper()}"
            address = address.replace("tcp:", "dask:", 1)
            console.warn(f"  no pool is served here: set {setting}={address} for the service")

    local_cluster.run(shape, on_ready)


def _address(settings: Settings, pools: Collection[str]) -> tuple[list[str], tuple[str, int]]:
    """The pools that the settings put on Dask, and the one address that they name, otherwise the
    default address.
    """
    on_dask = {
        name: pool.address
        for name, pool in sorted(settings.pools.items())
        if pool.address is not None and (not pools or name in pools)
    }
    if len(set(on_dask.values())) > 1:
        raise InvalidParameters(
            f"the pools {', '.join(on_dask)} are on several Dask clusters: "
            "name with --pool those whose cluster this machine should run"
        )
    for address in on_dask.values():
        parts = urlsplit(address)
        if parts.scheme == "tls":
            raise InvalidParameters(
                "--dask runs a cluster without TLS; docs/dask.md says how to start one with it"
            )
        return list(on_dask), (parts.hostname or "127.0.0.1", parts.port or DASK_PORT)
    return [], ("127.0.0.1", DASK_PORT)
