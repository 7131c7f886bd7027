"""Each verb, through each of its doors: who may ask for it, that the service answers what the
ledger answers, that its fields are parameters of its route, and what a change adds to the audit.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest

import batch_system
from batch_system import clock
from batch_system.errors import BatchError, Forbidden
from batch_system.operations.asking.actor import ROLES, Actor, Role
from batch_system.operations.asking.context import Performs
from batch_system.operations.asking.filter import RunFilter
from batch_system.operations.backups.backups import Backups
from batch_system.remote.connection import Connection
from batch_system.remote.operations import RemoteOperations
from batch_system.verbs import (
    access,
    backups,
    bulks,
    calendars,
    incidents,
    maintenance,
    night,
    run_changes,
    runs,
    slots,
    system,
    tasks,
    why,
)
from batch_system.verbs.verb import Verb, all_verbs
from batch_system.web.application import Api
from tests.batch.ledger_world import until
from tests.web.conftest import Served
from tests.web.test_v1 import ended, start

VERBS = {verb.__name__: verb for verb in all_verbs()}
WITHOUT_COMMAND = {
    "FindRunOrTask": "batch show asks it",
    "RunAsItIs": "commands poll it",
    "ListAttempts": "batch show has them",
    "ListRunsOfTask": "batch runs --task lists them",
    "ShowLog": "batch logs follows it",
    "ShowBulk": "verbs/following asks it for commands",
    "ShowIncident": "batch incidents has them",
    "ShowSchedule": "batch show has the slots",
    "ReopenIncident": "only the page undoes an acknowledgement",
    "LeaveSlots": "only the page leaves missed slots",
    "ReopenSlots": "only the page undoes that",
    **dict.fromkeys(
        ("ShowBackup", "VerifyBackup", "DiffBackup", "PinBackup", "UnpinBackup"),
        "batch backup works on files of this machine, also without a ledger",
    ),
}
"""Verbs that no command is named after."""


@dataclass
class World:
    """A service with a failed run, its incident, a run that waits for tomorrow, and a backup."""

    served: Served
    run: str
    waiting: str
    incident: str
    backup: str
    begin: datetime

    def remote(self, role: Role) -> RemoteOperations:
        return RemoteOperations(Connection(self.served.clients[role], "http://localhost"))


def tomorrow() -> datetime:
    return clock.now() + timedelta(days=1)


ID = "01a230e3-57e3-7352-ac77-221a8d380bd2"
ASKED: dict[type[Verb], Callable[[World], dict[str, Any]]] = {
    tasks.ListTasks: lambda w: {},
    tasks.ShowTask: lambda w: {"name": "report"},
    tasks.ShowSchedule: lambda w: {"name": "report", "n": 2},
    tasks.ShowPause: lambda w: {"name": "report"},
    tasks.PauseTask: lambda w: {"name": "report", "note": "a break"},
    tasks.ResumeTask: lambda w: {"name": "report"},
    tasks.ResumeTasksAhead: lambda w: {},
    tasks.MuteTask: lambda w: {"name": "report", "until": clock.now() + timedelta(hours=1)},
    tasks.UnmuteTask: lambda w: {"name": "report"},
    maintenance.PauseTasks: lambda w: {"all_tasks": True, "begins_at": tomorrow()},
    maintenance.MuteTasks: lambda w: {"all_tasks": True, "until": tomorrow()},
    maintenance.ListMaintenance: lambda w: {},
    calendars.ListCalendars: lambda w: {},
    runs.ListRuns: lambda w: {"state": ["failed"]},
    runs.ListRunsOfTask: lambda w: {"name": "report", "order": "created"},
    runs.ShowRun: lambda w: {"run": w.run},
    runs.FindRunOrTask: lambda w: {"given": w.run[-8:]},
    runs.RunAsItIs: lambda w: {"run": w.run},
    runs.ListAttempts: lambda w: {"run": w.run},
    runs.ShowLog: lambda w: {"run": w.run, "limit": 1, "text": "no such day"},
    runs.ShowBlocker: lambda w: {"run": w.run},
    runs.ShowChain: lambda w: {"run": w.run},
    runs.CountRunsAfter: lambda w: {"run": w.run},
    runs.ListQuarantineOfRun: lambda w: {"run": w.run},
    runs.ListQuarantine: lambda w: {},
    slots.AccountForSlots: lambda w: {"since": w.begin},
    system.ListNodes: lambda w: {"living": True},
    system.ListPools: lambda w: {},
    night.ShowStatus: lambda w: {},
    night.ShowNight: lambda w: {"zone": "Asia/Tokyo"},
    night.ShowForecast: lambda w: {"zone": "Asia/Tokyo"},
    incidents.ListIncidents: lambda w: {"state": "all"},
    why.WhyRun: lambda w: {"run": w.run},
    why.WhyTask: lambda w: {"name": "report"},
    why.WhyIncident: lambda w: {"incident": w.incident},
    incidents.ShowIncident: lambda w: {"incident": w.incident[-8:]},
    incidents.ListMessages: lambda w: {"state": "waiting"},
    incidents.AcknowledgeIncident: lambda w: {"incident": w.incident, "note": "known"},
    incidents.ReopenIncident: lambda w: {"incident": w.incident},
    run_changes.StartRun: lambda w: {"name": "report", "parameters": {"day": "x"}, "key": "one"},
    run_changes.AcknowledgeRun: lambda w: {"run": w.run, "note": "known"},
    run_changes.RetryRun: lambda w: {"run": w.run},
    run_changes.CancelRun: lambda w: {"run": w.waiting},
    bulks.PreviewBulk: lambda w: {"action": "retry", "filter": RunFilter(state=["failed"])},
    bulks.PreviewBackfill: lambda w: {"name": "report", "since": w.begin, "until": clock.now()},
    slots.LeaveSlots: lambda w: {"since": w.begin, "until": clock.now(), "dry_run": True},
    slots.ReopenSlots: lambda w: {"since": w.begin, "until": clock.now()},
    access.ListChanges: lambda w: {"action": "token.create", "counts": True},
    access.ListTokens: lambda w: {},
    access.CreateToken: lambda w: {"name": "laptop", "role": "viewer", "expires_in_days": 3},
    access.RevokeToken: lambda w: {"name": "laptop"},
    access.ListSessions: lambda w: {},
    backups.ListBackups: lambda w: {},
    backups.ShowBackup: lambda w: {"name": w.backup},
    backups.VerifyBackup: lambda w: {"name": w.backup},
    backups.DiffBackup: lambda w: {"name": w.backup},
    backups.PinBackup: lambda w: {"name": w.backup},
    backups.UnpinBackup: lambda w: {"name": w.backup},
}
"""A question for each verb, in an order in which all of them can be answered, and runs go on only
after the answers that count them.
"""
ELSEWHERE: dict[type[Verb], dict[str, Any]] = {
    run_changes.RedriveRun: {"run": ID},  # in test_cli_items
    maintenance.EndMaintenance: {"window": ID},  # in test_maintenance
    tasks.ListKeys: {"name": "mail"},  # in tests/batch/test_limits
    calendars.ShowCalendar: {"name": "bank"},  # in tests/cli/test_calendars
    bulks.BeginBulk: {"preview": ID},  # in test_remote
    bulks.ShowBulk: {"preview": ID},
    bulks.UndoBulk: {"preview": ID},
    bulks.BeginBackfill: {"name": "report", "preview": ID},
    incidents.SendTestMessage: {},  # in tests/incidents
    system.Diagnose: {},  # in tests/operations/test_doctor
    access.EndSession: {"session": "3fa91c22"},  # in tests/pages/test_pages
}
"""Questions that need more than this world has, which other tests ask."""
SILENT = {"ResumeTasksAhead", "LeaveSlots", "ReopenSlots"}
"""Changes that change nothing here: no clock was ahead, and no slot was missed."""
PASSING = {"beats", "seen_at", "loop_lag", "used_at", "used_from", "now", "until", "as_of"}
PASSING |= {"last_beat", "recounted_until", "age", "elapsed", "eta"}
"""What changes in answers from one moment to the next."""


@pytest.fixture
async def world(served: Served) -> World:
    begin = clock.now() - timedelta(hours=1)
    run = await start(served, parameters={"day": "never"})
    await ended(served.viewer, run)

    async def has_incident() -> bool:
        return bool((await served.operations(incidents.ListIncidents())).incidents)

    await until(has_incident)
    (incident, *_) = (await served.operations(incidents.ListIncidents())).incidents
    tomorrow = run_changes.StartRun(name="report", at=clock.now() + timedelta(days=1))
    waiting = (await served.operations(tomorrow)).id
    backup = await Backups(served.operations.context).create()
    return World(served, run, waiting, incident.id, backup.facts.name, begin)


def performs(verb: Verb) -> Performs[Any]:
    return cast(Performs[Any], verb)


def test_each_verb_is_asked_here_or_where_it_is_said() -> None:
    assert {*ASKED, *ELSEWHERE} == {*VERBS.values()}
    assert not ASKED.keys() & ELSEWHERE.keys()


async def test_the_service_answers_each_verb_as_the_ledger_does_and_the_audit_has_its_word(
    world: World,
) -> None:
    here = world.served.operations.by(Actor("admin", "admin", "api"))
    there = world.remote("admin")
    for verb, fields in ASKED.items():
        asked = verb(**fields(world))
        http = verb.doors.http
        assert http is not None
        if http.method == "GET":
            answers = [await each(performs(asked)) for each in (there, here)]
            assert comparable(answers[0]) == comparable(answers[1]), verb.__name__
            continue
        before = await audited(world)
        with suppress(*([BatchError] if verb.__name__ in SILENT else [])):
            await there(performs(asked))
        added = (await audited(world))[len(before) :]
        silent = verb.__name__ in SILENT or verb.doors.audit is None
        assert added == ([] if silent else [(verb.doors.audit, "admin")]), verb.__name__


async def audited(world: World) -> list[tuple[str, str]]:
    """The changes that came over the API, the oldest first."""
    listed = await world.served.operations(access.ListChanges(limit=200))
    mine = [change for change in reversed(listed.changes) if change.source == "api"]
    return [(change.action, change.actor) for change in mine]


def comparable(answer: Any) -> Any:
    text = json.dumps(answer.model_dump(mode="json"), sort_keys=True)
    return json.loads(
        text, object_hook=lambda each: {k: v for k, v in each.items() if k not in PASSING}
    )


async def test_a_lower_role_is_refused_by_both_doors_before_anything_is_looked_at(
    world: World,
) -> None:
    refused = 0
    for verb in VERBS.values():
        for role in ROLES[: ROLES.index(verb.doors.role)]:
            asked = verb(**(ASKED[verb](world) if verb in ASKED else ELSEWHERE[verb]))
            here = world.served.operations.by(Actor("ann", role))
            for door in (here, world.remote(role)):
                with pytest.raises(BatchError, match=f"needs the role {verb.doors.role}") as error:
                    await door(performs(asked))
                assert error.value.kind == Forbidden.kind
                refused += 1
    assert refused > 60


def test_each_field_is_a_parameter_of_the_route() -> None:
    document = Api().openapi()
    for verb in VERBS.values():
        http = verb.doors.http
        assert http is not None, f"{verb.__name__} has no route"
        route = document["paths"][f"/api/v1{http.path}"][http.method.lower()]
        sent = {each["name"] for each in route.get("parameters", [])}
        body = route.get("requestBody", {}).get("content", {}).get("application/json", {})
        names = set(json.dumps(body).split('"'))
        schema = next((name for name in names if name.endswith(f"/{verb.__name__}")), "")
        if schema:
            sent |= document["components"]["schemas"][verb.__name__]["properties"].keys()
        named = {**http.headers, **http.query}
        assert {named.get(name, name) for name in verb.model_fields} <= sent, verb.__name__


def test_each_verb_is_asked_by_a_command() -> None:
    """Commands name the verbs that they ask, as text where their options are made from them."""
    folder = Path(batch_system.__file__).parent / "cli"
    source = "".join(file.read_text() for file in folder.glob("*.py"))
    ways = ("{}(", "{}.model_construct(", ":{}")
    asked = {name for name in VERBS if any(way.format(name) in source for way in ways)}
    missing = VERBS.keys() - asked - WITHOUT_COMMAND.keys()
    assert not missing, f"no command asks {sorted(missing)}"


def test_the_options_of_a_command_that_asks_one_verb_are_made_from_its_fields() -> None:
    written_by_hand = {}
    for file in (Path(batch_system.__file__).parent / "cli").glob("*.py"):
        for command in ast.parse(file.read_text()).body:
            if not isinstance(command, ast.FunctionDef) or command.name.startswith("_"):
                continue
            options = {each.arg.rstrip("_") for each in command.args.args + command.args.kwonlyargs}
            called = [each.func for each in ast.walk(command) if isinstance(each, ast.Call)]
            asked = {each.id for each in called if isinstance(each, ast.Name)} & VERBS.keys()
            if any(options & VERBS[name].model_fields.keys() for name in asked):
                written_by_hand[f"{file.stem}.{command.name}"] = asked
    assert written_by_hand == {
        "bulk.change_all": {"PreviewBulk"},  # not a command: cancel, retry and ack call it
        # These take the name of a task or, as the options of a verb, a selection of tasks.
        "maintenance.end": {"EndMaintenance", "ListMaintenance"},
        "maintenance.mute": {"MuteTask"},
        "maintenance.pause": {"PauseTask"},
        "maintenance.resume": {"ResumeTask", "ResumeTasksAhead"},
        "maintenance.unmute": {"UnmuteTask"},
        "show.show": {"FindRunOrTask", "ShowRun"},
        "watch.with_log": {"RunAsItIs"},  # not a command
    }


def test_no_route_of_the_api_is_made_by_hand_but_those_that_are_no_question() -> None:
    by_hand = {"sign_in.py", "events.py"}
    folder = Path(batch_system.__file__).parent / "web"
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            decorators = getattr(node, "decorator_list", [])
            routes = [d for d in decorators if isinstance(d, ast.Call) and d.args]
            paths = [d.args[0].value for d in routes if isinstance(d.args[0], ast.Constant)]
            assert not [p for p in paths if str(p).startswith("/")] or file.name in by_hand, file
