"""The system as a whole: its processes, its pools, and what is wrong with its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from batch_system.operations.doctor.results import Diagnosis
from batch_system.operations.system.results import NodeList, PoolList
from batch_system.verbs.verb import Verb, get

if TYPE_CHECKING:
    from batch_system.operations.asking.context import Context


class ListNodes(Verb, role="viewer", http=get("/nodes", tag="service")):
    """List the processes of the service, also those that have stopped lately, the newest first."""

    living: bool = Field(False, description="Only those that live, the oldest first.")

    async def perform(self, context: Context) -> NodeList:
        from batch_system.operations.system import nodes

        if self.living:
            return NodeList(nodes=list(await nodes.living(context, with_workers=True)))
        return NodeList(nodes=list(await nodes.list_nodes(context)))


class ListPools(Verb, role="viewer", http=get("/pools", tag="service")):
    """List where runs execute: what serves each pool, its nodes, and how many runs are running and
    waiting.
    """

    async def perform(self, context: Context) -> PoolList:
        from batch_system.operations.system import pools

        return PoolList(pools=await pools.list_pools(context))


class Diagnose(Verb, role="operator", http=get("/doctor", tag="service")):
    """Look at each part that the service needs, and say what is wrong and what to do: databases,
    migrations, disks, processes, files of tasks, backups, channels, and the dead man's switch.
    """

    async def perform(self, context: Context) -> Diagnosis:
        from batch_system.operations.doctor import doctor

        return await doctor.diagnose(context)
