"""Runs on a Dask cluster with real worker processes, on both databases."""

from __future__ import annotations

from tests.dask.world import Place


async def test_runs_execute_in_the_workers_of_a_cluster(place: Place) -> None:
    cluster = place.cluster()
    place.serve(cluster)
    workers = {node["pid"] for node in await place.nodes(2)}
    await place.queue("empty", 200, exclusive=None)
    ended = await place.all_ended("empty", 200)
    assert {run["result"] for run in ended} <= workers
