"""The network to PostgreSQL is half open: what is sent is acknowledged and forgotten, as by a load
balancer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy import make_url

from batch_system.testing.databases import wait_for
from batch_system.testing.postgres import OwnServer, find_binaries
from tests.days.story import MISSED, Story, down
from tests.faults.network import Proxy, proxy

pytestmark = pytest.mark.days


class Deployment:
    """Two nodes, each with a door of its own to the server."""

    def __init__(self, folder: Path, server: OwnServer, network: Proxy) -> None:
        url = make_url(wait_for(server.create_database()))
        urls = [url.set(host="127.0.0.1", port=port, query={}) for port in network.ports]
        self.urls = [each.render_as_string(hide_password=False) for each in urls]
        self.network = network
        self.story = Story(
            folder / "story", {"DATABASE_URL": url.render_as_string(hide_password=False)}
        )

    def start(self) -> Story:
        for name, url in zip(("a", "b"), self.urls, strict=True):
            self.story.start(name, settings={"DATABASE_URL": url})
        self.story.until(lambda: len(self.story.ended_since(0)) == 12, 30, "all twelve tasks run")
        return self.story


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with ExitStack() as stack:
        server = stack.enter_context(OwnServer(find_binaries(), fast=True))
        network = stack.enter_context(proxy(server.directory, 2))
        made = Deployment(tmp_path, server, network)
        stack.enter_context(made.story)
        yield made


def test_the_network_of_one_node_is_half_open_for_40_seconds(deployment: Deployment) -> None:
    story = deployment.start()
    deployment.network.tell(0, "swallow", 40)
    story.wait(35)
    assert "ledger" in (story.nodes["a"].readiness() or {})
    assert story.nodes["b"].readiness() == {}
    story.wait(5)
    story.check_end()
    story.check_told()  # the other node has done all of its work


def test_the_network_of_all_is_half_open_for_three_minutes(deployment: Deployment) -> None:
    story = deployment.start()
    deployment.network.tell("all", "swallow", 180)
    story.wait(170)
    for node in story.nodes.values():
        assert "ledger" in (node.readiness() or {})
    story.wait(10)
    story.check_end()
    story.check_told(down("it does not answer in time"), headline=MISSED)


def test_each_packet_takes_half_a_second(deployment: Deployment) -> None:
    story = deployment.start()
    deployment.network.tell("all", "delay", 120, 0.5)
    story.wait(120)
    story.check_end()
    # A transaction of ten round trips may take longer than it has. Slots that were missed for that
    # are told as missed, or as an outage, and nothing else is told.
    if story.night["slots"]["missed"]:
        story.until(lambda: story.messages, 60, "the missed slots are told")
    for told in story.told().splitlines():
        assert re.match(
            r"(opened|closed) (missed \w+: N slots? up to TIME UTC|down : no service fired from "
            r"TIME)",
            told,
        )
