"""A story: nodes with default settings, as users start them; trouble that lasts longer than their
timers; and its end.

Each story ends with the same check (`Story.check_end`). What reached a person meanwhile is compared
as text: messages to the webhook, and what `batch status` and `batch nodes` say.
"""

from __future__ import annotations

import itertools
import json
import re
import signal
import socket
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import text

from batch_system.database.engine import Database
from batch_system.testing.databases import wait_for
from tests import preloaded
from tests.preloaded import Forked
from tests.processes import BATCH, SERVE, environment, suspend

END_SECONDS = 30.0
"""So long after the end of the trouble everything that is due is fired again."""
LEASE_SECONDS = 30.0
TOLD_SECONDS = 45.0
"""What has to be said is sent within so long: messages are collected for 20 seconds."""
START_SECONDS = 120.0

TASKS = '''
import asyncio
import os
import time

from batch_system import Alerts, BaseTask, current_run


def note(what):
    """A line in the witness: what a run does, where, and when since the machine's boot."""
    run = current_run()
    with open(os.environ["WITNESS"], "ab", buffering=0) as file:
        at = time.clock_gettime(time.CLOCK_BOOTTIME)
        file.write(f"{what} {run.task} {run.id} {run.fence} {os.getpid()} {at}\\n".encode())


class Tick(BaseTask):
    """Each second."""

    name, schedule, overlap = "tick", "* * * * * *", "allow"

    async def run(self):
        note("began")
        note("ended")


class Long(BaseTask):
    """A run that takes longer than most troubles begin."""

    name, schedule = "long", "*/10 * * * * *"

    async def run(self):
        note("began")
        try:
            await asyncio.sleep(7)
        finally:
            note("ended")
'''
SHORTS = "".join(
    f"""

class Short{number}(BaseTask):
    name, schedule = "short{number}", "*/4 * * * * *"

    async def run(self):
        note("began")
        try:
            await asyncio.sleep(0.05)
        finally:
            note("ended")
"""
    for number in range(10)
)
TWELVE = TASKS + SHORTS
"""Twelve tasks, which note in the witness what they do."""


MISSED = "Nothing failed. N slots were missed."
"""The last line of `batch status` where slots were missed and their incident is over."""


def down(cause: str | None = None) -> str:
    """What reaches a person after an outage of all services, or of the ledger (`cause`)."""
    why = f": the ledger could not be used ({cause})" if cause is not None else ""
    return (
        f"opened down : no service fired from TIME to TIME UTC (SOME TIME){why}. N slots of TASKS "
        "did not run; `batch night` lists them, `batch backfill` runs them."
    )


class Node:
    """A service in a process of its own. `at`: its address."""

    def __init__(self, name: str, process: subprocess.Popen[bytes] | Forked, log: Path) -> None:
        self.name, self.process, self.log = name, process, log
        self.at = ""

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def get(self, path: str, seconds: float = 10.0) -> httpx.Response:
        return httpx.get(self.at + path, timeout=seconds, trust_env=False)

    def readiness(self) -> dict[str, str] | None:
        """The reasons of `/readyz`; None if it does not answer."""
        try:
            reasons: dict[str, str] = self.get("/readyz").json().get("reasons", {})
        except (httpx.HTTPError, ValueError):
            return None
        return reasons

    def freeze(self) -> None:
        suspend(self.process.pid)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Story:
    """The nodes of one deployment, on one ledger, and what reached a person."""

    def __init__(self, folder: Path, settings: Mapping[str, str], tasks: str = TWELVE) -> None:
        """`settings`: the URLs of the databases, and nothing that changes a time."""
        self.folder = folder
        (folder / "tasks").mkdir(parents=True)
        (folder / "tasks/all.py").write_text(tasks)
        self.settings = {**settings, "WITNESS": str(folder / "witness")}
        self.nodes: dict[str, Node] = {}
        self._token: str | None = None
        self.prefix: tuple[str, ...] = ()
        """What commands of the story begin with, where they need more than its folder."""
        self.began = datetime.now(UTC)
        self.frozen: list[tuple[int, float, float]] = []
        """Which process was frozen or blocked, from when until when (boot time)."""
        self.deaths: dict[int, float] = {}
        self._stack = ExitStack()
        self.messages: list[str] = []
        self._inbox = self._stack.enter_context(_inbox(self.messages))

    def __enter__(self) -> Story:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes.values():
            with suppress(ProcessLookupError):
                node.process.kill()
            node.process.wait()
        self._stack.close()

    def start(
        self, *names: str, settings: Mapping[str, str] | None = None, command: tuple[str, ...] = ()
    ) -> None:
        """Start these nodes, one after another, until each is ready."""
        for name in names:
            self.launch(name, settings=settings, command=command)
            self.until_ready(self.nodes[name], START_SECONDS)

    def launch(
        self,
        name: str,
        settings: Mapping[str, str] | None = None,
        command: tuple[str, ...] = (),
        waits: bool = True,
    ) -> Node:
        """Start a node until its port is known. `waits=False`: return at once, after a start from
        nothing.
        """
        number = len(list(self.folder.glob(f"{name}.*.log")))
        log = self.folder / f"{name}.{number}.log"
        env = environment({**self.settings, "BATCH_ALERT_WEBHOOK": self._inbox, **(settings or {})})
        process: subprocess.Popen[bytes] | Forked
        with log.open("wb") as file:
            if waits and not command:
                process = preloaded.start(SERVE, self.folder, env, file, file)
            else:
                process = subprocess.Popen(
                    command or SERVE, cwd=self.folder, env=env, stdout=file, stderr=file
                )
        node = self.nodes[name] = Node(name, process, log)
        if not waits:
            return node
        found = self.until(
            lambda: re.search(r"http://127\.0\.0\.1:\d+", node.said),
            START_SECONDS,
            f"{name} listens",
        )
        node.at = found[0]
        return node

    def kill(self, name: str) -> None:
        self.nodes[name].kill()
        self.deaths[self.nodes[name].process.pid] = boottime()

    def deploy(self, tasks: str, *names: str) -> None:
        """Give nodes new code, one after the other, as a rolling deploy does."""
        (self.folder / "tasks/all.py").write_text(tasks)
        for name in names:
            self.nodes[name].process.terminate()
            self.nodes[name].process.wait(60)
            self.deaths[self.nodes[name].process.pid] = boottime()
            self.start(name)

    def request_runs(self, task: str, number: int = 1, seconds: float = 60.0) -> None:
        """Start runs of a task by the API of the first node that lives."""
        if self._token is None:
            self._token = self.batch("token", "create", "story", "--role", "operator").splitlines()[
                0
            ]
        node = next(node for node in self.nodes.values() if node.is_alive)
        headers = {"Authorization": f"Bearer {self._token}"}
        with httpx.Client(headers=headers, trust_env=False, timeout=seconds) as client:
            for _ in range(number):
                while (
                    answer := client.post(f"{node.at}/api/v1/tasks/{task}/runs", json={})
                ).status_code == 429:
                    time.sleep(float(answer.headers["Retry-After"]))
                answer.raise_for_status()

    def is_running(self, task: str) -> bool:
        """Whether a run of this task has begun a moment ago, so that it goes on for some
        seconds.
        """
        lines = [line for line in self.witness() if line[1] == task]
        return bool(lines) and lines[-1][0] == "began" and self.now() - float(lines[-1][5]) < 2

    def batch(self, *words: str, code: int | None = 0, within: float = 120.0) -> str:
        """What the command prints. `code`: its exit code; None: any."""
        done = preloaded.run(
            [*self.prefix, *BATCH, *words], self.folder, environment(self.settings), within=within
        )
        assert code is None or done.returncode == code, (
            f"batch {' '.join(words)}: {done.stdout}\n{done.stderr}"
        )
        return done.stdout + done.stderr

    def until(
        self, condition: Callable[[], Any], seconds: float, what: str | Callable[[], str]
    ) -> Any:
        """Wait until `condition()` is true, and return what it gave; fail with all logs after this
        many seconds.

        `what` was waited for, or a function that says it when the time is over.
        """
        give_up_at = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < give_up_at, (
                f"not within {seconds:g} s: "
                f"{what if isinstance(what, str) else what()}\n{self.logs()}"
            )
            time.sleep(0.25)
        return found

    def until_ready(self, node: Node, seconds: float) -> None:
        self.until(
            lambda: node.readiness() == {},
            seconds,
            lambda: f"{node.name} is ready; it says {node.readiness()}, where None is no answer",
        )

    @staticmethod
    def now() -> float:
        """The time since boot, as the witness has it."""
        return boottime()

    @staticmethod
    def clock() -> datetime:
        return datetime.now(UTC)

    def wait(self, seconds: float) -> None:
        """Let the trouble last. A story waits by the clock: its subject is what happens while time
        passes.
        """
        time.sleep(seconds)

    def logs(self, most: int = 4_000) -> str:
        return "\n".join(
            f"--- {name} ({node.process.poll()})\n{node.said[-most:]}"
            for name, node in self.nodes.items()
        )

    def count_runs(self, task: str, state: str) -> int:
        query = "SELECT count(*) AS n FROM batch_runs WHERE task = :task AND state = :state"
        return int(self.rows(query, task=task, state=state)[0]["n"])

    def rows(self, statement: str, of: str = "LEDGER_URL", **values: Any) -> list[dict[str, Any]]:
        """The rows that a query finds in the ledger, or in the application's database
        (`of="DATABASE_URL"`).
        """

        async def ask() -> list[dict[str, Any]]:
            urls = {
                "DATABASE_URL": self.settings.get(
                    "DATABASE_URL", f"sqlite+aiosqlite:///{self.folder}/app.db"
                )
            }
            urls["LEDGER_URL"] = self.settings.get(
                "LEDGER_URL", urls["DATABASE_URL"].replace("/app.db", "/ledger.db")
            )
            database = Database(urls[of], setting=of, pooled=False)
            async with database.reader.connect() as connection:
                return [
                    dict(row)
                    for row in (await connection.execute(text(statement), values)).mappings()
                ]

        return wait_for(ask())

    # What the witness says.

    def ended_since(self, at: float) -> set[str]:
        """The tasks of which a run has begun and ended since this instant (boot time)."""
        lines = self.witness()
        begun = {
            (line[2], line[3]) for line in lines if line[0] == "began" and float(line[5]) >= at
        }
        return {line[1] for line in lines if line[0] == "ended" and (line[2], line[3]) in begun}

    def witness(self) -> list[list[str]]:
        try:
            return [
                line.split()
                for line in (self.folder / "witness").read_text().splitlines()
                if line.count(" ") == 5
            ]
        except FileNotFoundError:
            return []

    # The end of each story.

    def check_end(self, tasks: set[str] | None = None, gaps: bool = True) -> None:
        """Everything fires again by itself within 30 seconds, and what the ledger says about the
        trouble is true.

        `tasks`: those that fire again; None: all twelve.
        """
        over_at = boottime()
        wanted = (
            tasks
            if tasks is not None
            else {"tick", "long", *(f"short{number}" for number in range(10))}
        )
        self.until(lambda: self.ended_since(over_at) >= wanted, END_SECONDS, f"all fire: {wanted}")
        for node in self.nodes.values():
            if node.is_alive:
                self.until_ready(node, END_SECONDS)
                assert node.get("/healthz").status_code == 200
        self.check_doubles()
        since = self.began.isoformat()
        self.account = json.loads(self.batch("account", "--since", since, "--json"))
        self.check_night(since)
        print(
            self.told(),
            self.status(),
            self.batch("nodes"),
            self.night["sentence"],
            self.logs(),
            sep="\n\n",
        )

    def check_night(self, since: str) -> None:
        """The classes of Night add up to the slots that were due, and none of them is unaccounted
        for.
        """
        self.night = json.loads(self.batch("night", "--since", since, "--json", code=None))
        counts = self.night["slots"]
        classes = (
            "succeeded",
            "failed",
            "cancelled",
            "skipped",
            "missed",
            "paused",
            "active",
            "unaccounted",
        )
        assert counts["due"] == sum(counts[name] for name in classes), counts
        assert counts["unaccounted"] == 0, counts

    def check_doubles(self) -> None:
        """No run was executed by two processes at a time, unless the first one was dead, frozen or
        blocked.
        """
        by_run: dict[str, list[list[str]]] = defaultdict(list)
        last_line: dict[int, float] = {}
        for line in self.witness():
            by_run[line[2]].append(line)
            last_line[int(line[4])] = float(line[5])
        living = {node.process.pid for node in self.nodes.values() if node.is_alive}
        for run, lines in by_run.items():
            begun = [line for line in lines if line[0] == "began"]
            for first, second in itertools.pairwise(begun):
                ends = [float(e[5]) for e in lines if e[0] == "ended" and e[3:5] == first[3:5]]
                pid, at = int(first[4]), float(second[5])
                end = min([*ends, self.deaths.get(pid, float("inf"))])
                if pid not in living:  # a killed process may have died long before the story saw it
                    end = min(end, last_line[pid])
                was_frozen = any(
                    p == pid and since < at < until + LEASE_SECONDS
                    for p, since, until in self.frozen
                )
                assert at >= end or was_frozen, (
                    f"the run {run} was executed twice at a time: {lines}\n{self.logs()}"
                )

    def told(self) -> str:
        """What reached a person by the webhook: a line for each event, without times, ids and
        numbers of processes.
        """
        return "\n".join(plain(message) for message in self.messages)

    def check_told(self, *lines: str, headline: str | None = "Nothing needs you.") -> None:
        """What has reached a person is these lines, each once. `headline`: how `batch status` ends;
        None: anyhow.
        """
        expected = "\n".join(lines)
        give_up_at = time.monotonic() + TOLD_SECONDS
        while self.told() != expected and time.monotonic() < give_up_at:
            time.sleep(0.25)
        assert self.told() == expected
        while headline is not None and (said := self.status()).strip().splitlines()[-1] != headline:
            assert time.monotonic() < give_up_at, said
            time.sleep(1)

    def status(self) -> str:
        """What `batch status` says, without times, ids and numbers of processes."""
        return plain(self.batch("status", code=None))


def boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def plain(text: str) -> str:
    """The text with times, ids and process numbers replaced by their kinds."""
    for pattern, kind in (
        (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|\+00:00)?", "TIME"),
        (r"\b\d\d:\d\d:\d\d\b", "TIME"),
        (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID"),
        (r"pid \d+", "pid N"),
        (r"\bfor \d+ (seconds|minutes|s)\b", "for SOME TIME"),
        (r"\(\d+ (seconds|minutes|hours|days)\)", "(SOME TIME)"),
        (r"those of [\w, ]+\.", "those of TASKS."),
        (r"of \d+ tasks \([\w, ]+, …\)", "of TASKS"),  # one of them may have had no slot then
        (r"\b\d+ services\b", "N services"),
        (rf"\b{re.escape(socket.gethostname())}\b", "HOST"),
        (r"between TIME and TIME UTC", "after TIME UTC"),  # as their schedules have it
        (r"\b\d[\d,]* slots?\b", "N slots"),
    ):
        text = re.sub(pattern, kind, text)
    return text


@contextmanager
def _inbox(messages: list[str]) -> Iterator[str]:
    """A webhook that keeps each problem as a line: what happened, and the text for people."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            for event in body["events"]:
                incident, problem = event["incident"], event.get("problem")
                if problem is None or problem["first"] == incident["id"]:
                    of = (
                        f"{problem['tasks']} tasks"
                        if problem is not None
                        else incident.get("task") or ""
                    )
                    messages.append(
                        f"{event['event']} {incident.get('kind')} {of}: {incident.get('text')}"
                    )
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
