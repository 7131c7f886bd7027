"""A child as the service sees it. The test plays the process of the child."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any, cast

from batch_system.batch.execution.ending import Ending
from batch_system.batch.ledger.states import RunState
from batch_system.batch.pools import child_json, frames
from batch_system.batch.pools.child import Child
from batch_system.batch.pools.nursery import Begun, Nursery
from batch_system.logs import relay
from batch_system.logs.mode import stamp_now
from tests.batch.attempts import SLOT
from tests.batch.ledger_world import make_task


class Played:
    """A nursery whose child tells two lines and its ending, and ends without having read
    anything.
    """

    def reserve(self) -> int:
        return 1

    def release(self, number: int) -> None:
        """Nothing is kept."""

    async def begin(self, number: int, connection: socket.socket, output: int) -> Begun:
        lines = [relay.told(stamp_now(), "info", "authors", text) for text in ("first", "second")]
        ending = Ending(RunState.SUCCEEDED, "succeeded", result=7)
        messages: list[dict[str, Any]] = [{"lines": [line]} for line in lines]
        messages.append({"end": child_json.ending_as_json(ending)})
        with socket.socket(fileno=os.dup(connection.fileno())) as its_end:
            its_end.sendall(b"".join(map(frames.encoded, messages)))
        ended = asyncio.get_running_loop().create_future()
        ended.set_result(0)
        return Begun(1, ended)


async def test_what_a_child_has_told_is_read_to_its_end_even_if_it_left_something_unread() -> None:
    from batch_system.batch.execution.attempt import Attempt
    from batch_system.batch.ledger.runs import Claimed
    from batch_system.concurrency.thread_pool import ThreadPool

    async def has_kernel_killed() -> bool:
        return False

    async def find_nursery() -> tuple[Nursery, int]:
        return cast(Nursery, Played()), 1

    claimed = Claimed("id", "t", None, "manual", None, 1, 1, SLOT, SLOT)
    attempt = Attempt(claimed, make_task("t", None), ThreadPool(1), lambda *_: None)
    ending = await Child(attempt, find_nursery, has_kernel_killed).execute()
    assert (ending.state, ending.result) == (RunState.SUCCEEDED, 7)
