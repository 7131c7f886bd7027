"""The services and workers that are disturbed, and those that come to rest in the end."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from pathlib import Path

from tests.faults.world import LEASE, NUMBER, POOL, SERVICES, World, boottime
from tests.faults.wrong_clock import SERVE
from tests.processes import Service, process, suspend

WORK = (*SERVE[:3], "work", "--pool", POOL)
STALL_SECONDS = LEASE / 5
START_SECONDS = 120.0
CALM_SECONDS = 90.0
END_SECONDS = 45.0


class Nodes:
    """The services and workers that live now, by their places. One that ends is replaced."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._living: dict[int, Service] = {}
        self._asleep: dict[int, tuple[float, float]] = {}
        """Places whose service is frozen: since when in boot time, and until when in monotonic
        time.
        """
        self._leaving: list[tuple[Service, float]] = []
        for place in range(SERVICES):
            self.start(place)
        self.until_they_serve()  # a worker makes no ledger
        for place in range(SERVICES, NUMBER):
            self.start(place)

    def start(self, place: int) -> None:
        command = SERVE if place < SERVICES else WORK
        started = self._world.stack.enter_context(
            process(self._world.folder, command, self._world.settings(place))
        )
        self._living[place] = started
        self._world.places[started.process.pid] = place

    def victim(self) -> int:
        """A place whose service is awake, and serves, as a rule."""
        give_up_at = time.monotonic() + START_SECONDS
        may_begin = self._world.random.random() < 0.15
        while True:
            awake = sorted(self._living.keys() - self._asleep.keys())
            if candidates := [
                place for place in awake if may_begin or has_begun(self._living[place])
            ]:
                return self._world.random.choice(candidates)
            self._until(give_up_at)

    def until_they_serve(self) -> None:
        give_up_at = time.monotonic() + START_SECONDS
        while not all(map(has_begun, self._living.values())):
            self._until(give_up_at)

    def until_all_are_well(self) -> None:
        """As a rule: so that there is somebody to take over what the next one loses."""
        if self._world.random.random() < 0.8:
            while self._asleep or time.monotonic() < self._world.network_is_well_at:
                self.pass_time(0.1)

    def _until(self, give_up_at: float) -> None:
        said = [service.stderr[-2000:] for service in self._living.values()]
        assert time.monotonic() < give_up_at, "\n".join(["no service begins:", *said])
        self.pass_time(0.1)

    def name(self, place: int) -> str:
        return f"{place} (pid {self._living[place].process.pid})"

    def kill(self, place: int) -> None:
        ended = self._living.pop(place)
        self._world.blame(f"pid {ended.process.pid}", math.inf)
        self._wake(place, ended)
        ended.process.kill()
        ended.process.wait()

    def kill_below(self, place: int) -> str:
        """Kill one of the processes that descend from the one in this place, if it has any."""
        below = (
            sorted(children_of(self._living[place].process.pid)) if place in self._living else []
        )
        if not below:
            return "nobody"
        pid = self._world.random.choice(below)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return f"{pid}, {'the nursery' if pid == below[0] else 'a child'}, of {self.name(place)}"

    def terminate(self, place: int) -> Service:
        """Ask it to end; it may take its time."""
        ended = self._living.pop(place)
        self._world.blame(f"pid {ended.process.pid}", math.inf)
        ended.process.send_signal(signal.SIGTERM)
        self._leaving.append((ended, time.monotonic() + END_SECONDS))
        return ended

    def freeze(self, place: int, seconds: float) -> None:
        self._world.blame(f"pid {self._living[place].process.pid}", seconds, after=LEASE / 2)
        suspend(self._living[place].process.pid)
        self._asleep[place] = boottime(), time.monotonic() + seconds
        # Nobody can renew a lease until this process goes on or is killed.
        if self._world.is_ledger_locked():
            self._world.say("   it holds the lock of the ledger")
            for other in self._living:
                self._world.blame(f"place {other}", seconds, after=LEASE / 2)

    def pass_time(self, seconds: float) -> None:
        """Meanwhile those wake whose time has come, and those that have ended by themselves are
        replaced.
        """
        until = time.monotonic() + seconds
        while True:
            for place, (_, wakes_at) in list(self._asleep.items()):
                if time.monotonic() >= wakes_at:
                    self._wake(place, self._living[place])
            self._replace_the_dead()
            self._bury()
            if (seconds_left := until - time.monotonic()) <= 0:
                return
            self._sleep(min(seconds_left, 0.05))

    def _sleep(self, seconds: float) -> None:
        """A machine that lets this process wait lets the services wait too: none of them can be
        blamed for that.
        """
        since = boottime()
        time.sleep(seconds)
        if boottime() - since < seconds + STALL_SECONDS:
            return
        self._world.say("   the machine stood still")
        for place, service in self._living.items():
            self._world.frozen.append((service.process.pid, since, boottime()))
            self._world.blame(f"place {place}", 0)

    def end(self) -> None:
        """All of them wake, and end."""
        self.pass_time(
            max([0.0, *(wakes_at - time.monotonic() for _, wakes_at in self._asleep.values())])
        )
        for place in list(self._living):
            self.terminate(place)
        while self._leaving:
            self.pass_time(0.1)

    def _wake(self, place: int, service: Service) -> None:
        if place in self._asleep:
            since, _ = self._asleep.pop(place)
            self._world.frozen.append((service.process.pid, since, boottime()))
            service.process.send_signal(signal.SIGCONT)

    def _replace_the_dead(self) -> None:
        for place, service in list(self._living.items()):
            if (code := service.process.poll()) is None:
                continue
            self._world.say(
                f"   {self.name(place)} has ended by itself, with {code}: {service.stderr[-150:]}"
            )
            self._world.counts["ended by itself"] += 1
            # A process that is frozen with the lock of a SQLite ledger is killed by the others
            # after a lease.
            was_killed = code == -signal.SIGKILL and self._asleep.pop(place, None) is not None
            if was_killed:
                self._world.blame(f"pid {service.process.pid}", math.inf)
            elif has_begun(service):
                self._world.wrong.append(
                    f"a service has ended by itself, with {code}:\n{service.stderr[-4000:]}"
                )
            self._living.pop(place)
            self.start(place)

    def _bury(self) -> None:
        for service, give_up_at in list(self._leaving):
            if service.process.poll() is not None:
                self._leaving.remove((service, give_up_at))
            elif time.monotonic() > give_up_at:
                self._leaving.remove((service, give_up_at))
                pid = service.process.pid
                self._world.wrong.append(
                    f"pid {pid} lives {END_SECONDS:g} s after SIGTERM:\n{service.stderr[-4000:]}"
                )
                service.process.kill()


def children_of(pid: int) -> set[int]:
    """The processes that descend from this one."""
    own = own_children_of(pid)
    return own | {each for child in own for each in children_of(child)}


def own_children_of(pid: int) -> set[int]:
    """The processes whose parent is this one."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for file in files for child in file.read_text().split()}


def has_begun(service: Service) -> bool:
    return "http://" in service.stdout or "of other pools" in service.stdout


def come_to_rest(world: World) -> None:
    """Nothing new fires, and what is active comes to its end.

    Runs that have lost their node again and again, and slots over which a clock was set, wait for
    minutes. They don't here.
    """
    world.say("rest")
    world.fires = False
    settings = world.settings()
    with (
        process(world.folder, SERVE, settings) as last,
        process(world.folder, WORK, settings) as worker,
    ):
        world.places[worker.process.pid] = SERVICES
        give_up_at = time.monotonic() + CALM_SECONDS
        while active := world.active():
            if time.monotonic() > give_up_at:
                world.wrong.append(
                    f"still active: {active}\n{last.stderr[-3000:]}\n{worker.stderr[-3000:]}"
                )
                break
            world.end_long_waits()
            time.sleep(0.3)
        for each in (worker, last):
            each.stop(within=END_SECONDS)
    world.say("over")
