"""The three groups of the command box: where to go, which runs to filter, and what to do.

The page of the search and the box over any page show the same groups, from the same function.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote, urlencode

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger.run_query import Number
from batch_system.batch.ledger.states import ACTIVE, IncidentKind, RunState
from batch_system.errors import InvalidParameters
from batch_system.operations.asking.filter import RunFilter
from batch_system.operations.runs import finding
from batch_system.operations.runs.finding import FoundIncident, FoundTask
from batch_system.pages.frame import formatting
from batch_system.pages.frame.shell import PAGES
from batch_system.pages.frame.viewer import Viewer
from batch_system.pages.runs.run_filter import address, command_of, conditions_of
from batch_system.pages.search.meaning import Meaning
from batch_system.words import INCIDENTS, STATES, short

MOST = 4
"""A group has at most this many lines."""
MOST_TASKS = 20
"""At most this many tasks are found, of which the first ones are shown."""
LATELY = "7d"
WITH_REASON = (
    RunState.FAILED,
    RunState.RETRYING,
    RunState.INTERRUPTED,
    RunState.CANCELLED,
    RunState.SKIPPED,
)
"""The states that have a reason which people look for."""
OTHER_PAGES = (
    ("Calendars", "/calendars"),
    ("Maintenance", "/maintenance"),
    ("You, tokens and sessions", "/you"),
)
ICONS = {
    "retry": "rotate-cw",
    "acknowledge": "check",
    "start": "play",
    "pause": "circle-pause",
    "resume": "play",
    "mute": "bell-off",
    "backfill": "calendar-plus",
    "cancel": "ban",
}


@dataclass(frozen=True)
class Line:
    """One thing that can be chosen. `parts`: its label, and of each part whether it is bold.
    `note`: what stands at its right. `command`: the same in a terminal.
    """

    path: str
    icon: str
    parts: Sequence[tuple[str, bool]]
    note: str
    command: str = ""
    css: str = ""


@dataclass
class Groups:
    """The lines of each group, and the filter of runs that was understood first, as the page of
    runs has it in its address. `has_runs`: whether runs are like this.
    """

    go_to: Sequence[Line] = ()
    filters: Sequence[Line] = ()
    do: Sequence[Line] = ()
    filter: Mapping[str, str] = field(default_factory=dict)
    has_runs: bool = False
    command: str = ""

    @property
    def titled(self) -> list[tuple[str, Sequence[Line]]]:
        """The groups that have lines."""
        named = (("Go to", self.go_to), ("Filter", self.filters), ("Do", self.do))
        return [(title, lines) for title, lines in named if lines]


async def groups_of(meaning: Meaning, viewer: Viewer, most_ids: int) -> Groups:
    """What these words mean to this person. `most_ids`: among so many runs the end of an id is
    looked for.
    """
    if not meaning.text:
        return Groups()
    async with viewer.operations.context.databases.reading() as connection:
        if connection is None:
            return Groups(go_to=[*_pages(meaning)][:MOST])
        return await _found(connection, meaning, viewer, most_ids)


async def _found(
    connection: AsyncConnection, meaning: Meaning, viewer: Viewer, most_ids: int
) -> Groups:
    names = meaning.rest or meaning.words
    tasks = await finding.find_tasks(connection, names, MOST_TASKS)
    runs = (
        await finding.find_runs(connection, meaning.digits, MOST, most_ids)
        if meaning.digits and not tasks
        else []
    )
    of_tasks = [each.incident for each in tasks if each.incident is not None]
    incidents = of_tasks
    is_unnamed = not meaning.rest and bool(meaning.actions)
    if not tasks and not runs and (is_unnamed or meaning.digits):
        opened = await finding.find_incidents(connection)
        incidents = [each for each in opened if each.id.replace("-", "").endswith(meaning.digits)]
    go_to = [*_pages(meaning), *(_run(row) for row in runs)]
    shown = [_incident(each, meaning, viewer) for each in incidents[: 1 if tasks else MOST]]
    go_to += [*shown, *(_task(each, meaning) for each in tasks)]
    first: Mapping[str, str] = {}
    filters: list[Line] = []
    has_runs = False
    for given in _filters(meaning, tasks) if not runs else ():
        try:
            wanted = wanted_of(given, viewer)
            number = await finding.number_of(connection, viewer.operations.context, wanted)
        except InvalidParameters:
            continue  # no filter, such as one by a secret value
        if not filters:
            first, has_runs = given, number.number > 0
        filters.append(_filter(given, number, viewer))
    if tasks and meaning.rest and not meaning.actions:
        filters.append(_changes(tasks[0]))
    do = [*_actions(meaning, tasks, runs, incidents)] if viewer.may("operator") else []
    groups = Groups(go_to[:MOST], filters[:MOST], do[:MOST], first, has_runs)
    likely = (groups.do, groups.filters) if meaning.actions else (groups.filters, groups.go_to)
    lines = [line for group in likely for line in group]
    groups.command = next((line.command for line in lines if line.command), "")
    return groups


def _pages(meaning: Meaning) -> Iterator[Line]:
    wanted = meaning.text.lower()
    for label, path in (*((label, path) for _, label, path in PAGES), *OTHER_PAGES):
        if len(wanted) > 1 and label.lower().startswith(wanted):
            yield Line(path, "arrow-right", _marked(label, [wanted]), "page")


def _run(row: Mapping[str, object]) -> Line:
    run, task, state = str(row["id"]), str(row["task"]), str(row["state"])
    parts = [("Run ", False), (short(run), True), (f" of {task}", False)]
    icon = STATES[RunState(state)].icon
    return Line(f"/runs/{run}", icon, parts, f"run · {state}", f"batch show {run}", f"c-{state}")


def _incident(incident: FoundIncident, meaning: Meaning, viewer: Viewer) -> Line:
    since = formatting.moment(incident.opened_at, viewer.zone, viewer.now)
    words = f"{incident.task} has been failing since {since}"
    if incident.kind != IncidentKind.FAILED:
        words = f"{INCIDENTS[incident.kind].message.format(task=incident.task)}, since {since}"
    path = f"/incidents/{incident.id}"
    icon, css = ("circle-x", "c-failed")
    if incident.kind != IncidentKind.FAILED:
        icon, css = ("triangle-alert", "c-retrying")
    note = "incident, acknowledged" if incident.is_acknowledged else "incident"
    return Line(path, icon, _marked(words, meaning.rest), note, css=css)


def _task(task: FoundTask, meaning: Meaning) -> Line:
    words = meaning.rest or meaning.words
    tags = [tag for tag in task.tags if tag.lower() in words]
    about = f"tag {tags[0]}" if tags else "paused" if task.is_paused else task.words or "by hand"
    parts = _marked(task.name, words)
    return Line(_of_task(task), "list", parts, f"task · {about}", f"batch show {task.name}")


def _of_task(task: FoundTask, door: str = "") -> str:
    return f"/tasks/{quote(task.name, safe='')}{door}"


def _filters(meaning: Meaning, tasks: Sequence[FoundTask]) -> Iterator[dict[str, str]]:
    """The filters of runs that the words may mean, the likeliest first, as `given` of run_filter.

    A parameter is nothing else.
    """
    if meaning.is_parameter:
        yield {"param": meaning.text, "within": LATELY}
        return
    of_state = {"state": meaning.states[0]} if meaning.states else {}
    text = " ".join(meaning.rest)
    if not meaning.rest:
        yield from ({"state": state} for state in meaning.states)
        return
    tags = [tag for task in tasks for tag in task.tags if tag.lower() == text]
    yield from ({"task": task.name, **of_state} for task in tasks[: 1 if tags else 2])
    if tags:
        yield {"tag": tags[0], **of_state}
    yield {"text": text, **of_state, "within": LATELY}


def _filter(given: dict[str, str], number: Number, viewer: Viewer) -> Line:
    """A line that leads to these runs."""
    named = [name for name in ("task", "tag", "param", "text") if name in given]
    words = {"param": "with the parameter", "text": "whose reason has"}
    parts = [("Runs", False)]
    if "state" in given:
        parts += [(" ", False), (given["state"], True)]
    for name in named:
        value = f"“{given[name]}”" if name == "text" else given[name]
        parts += [(f" {words.get(name, f'of {name}')} ", False), (value, True)]
    asked = {name: value for name, value in given.items() if name != "within"}
    command = command_of(conditions_of(asked, viewer))
    if "within" in given:
        command += f" --since {LATELY}"
    return Line(address(given), "search", parts, _number(number, given), command)


def wanted_of(given: Mapping[str, str], viewer: Viewer) -> RunFilter:
    """The filter of runs. The text of a reason is looked for where there are reasons."""
    conditions = conditions_of(given, viewer)
    if "text" in given and "state" not in given:
        conditions["state"] = list(WITH_REASON)
    return RunFilter.of(**conditions)


def _number(number: Number, given: Mapping[str, str]) -> str:
    days = " of 7 days" if "within" in given else ""
    if number.is_all:
        return f"{formatting.counted(number.number, 'run')}{days}"
    if number.number == number.of:
        return f"{number.number:,}+ runs{days}"
    return f"{number.number:,} of the newest {number.of:,}"


def _changes(task: FoundTask) -> Line:
    path = f"/changes?{urlencode({'task': task.name})}"
    parts = [("Changes of ", False), (task.name, True)]
    return Line(path, "history", parts, "who, when, why", f"batch changes --task {task.name}")


def _actions(
    meaning: Meaning,
    tasks: Sequence[FoundTask],
    runs: Sequence[Mapping[str, object]],
    incidents: Sequence[FoundIncident],
) -> Iterator[Line]:
    """What can be done: the actions that are named, or else those that the run, or the first task,
    is likely to need.
    """
    if len(runs) == 1:
        yield from _of_run(runs[0], meaning.actions)
        return
    for action in meaning.actions:
        for incident in incidents:
            if action in ("retry", "acknowledge"):
                yield from _of_incident(incident, (action,))
        for task in tasks:
            yield from _of_one_task(task, (action,))
        if not meaning.rest and action in ("pause", "mute"):
            path, label = f"/maintenance/{action}", f"{action.capitalize()} many tasks…"
            yield _action(action, path, label, f"batch {action} --all")
    if tasks and meaning.rest and not meaning.actions:
        first = tasks[0]
        if first.incident is not None:
            yield from _of_incident(first.incident, ("retry", "acknowledge"))
        yield from _of_one_task(first, ("start", "pause", "resume", "mute"))


def _of_run(row: Mapping[str, object], wanted: Sequence[str]) -> Iterator[Line]:
    run, state = str(row["id"]), RunState(str(row["state"]))
    allowed = ["cancel" if state in ACTIVE else "retry"]
    if state == RunState.FAILED:
        allowed.append("acknowledge")
    for action in allowed:
        if not wanted or action in wanted:
            label = f"{action.capitalize()} the run {short(run)} of {row['task']}…"
            command = f"batch {'ack' if action == 'acknowledge' else action} {run}"
            yield _action(action, f"/runs/{run}/{action}", label, command)


def _of_incident(incident: FoundIncident, wanted: Sequence[str]) -> Iterator[Line]:
    path = f"/incidents/{incident.id}"
    if "retry" in wanted and incident.kind == IncidentKind.FAILED:
        label = f"Retry the failed runs of {incident.task}, one as a trial…"
        command = f"batch retry --task {incident.task} --state failed"
        yield _action("retry", f"{path}/retry", label, command)
    if "acknowledge" in wanted and not incident.is_acknowledged:
        label = f"Acknowledge the incident of {incident.task}…"
        yield _action("acknowledge", f"{path}/acknowledge", label, f"batch ack {incident.id}")


def _of_one_task(task: FoundTask, wanted: Sequence[str]) -> Iterator[Line]:
    labels = {
        "start": (f"Start {task.name} now…", f"batch run {task.name}"),
        "pause": (f"Pause {task.name} until…", f"batch pause {task.name}"),
        "resume": (f"Resume {task.name}…", f"batch resume {task.name}"),
        "mute": (f"Mute {task.name}…", f"batch mute {task.name}"),
        "backfill": (f"Backfill {task.name}…", f"batch backfill {task.name}"),
    }
    not_now = "pause" if task.is_paused else "resume"
    for action in wanted:
        if action in labels and action != not_now:
            label, command = labels[action]
            yield _action(action, _of_task(task, f"/{action}"), label, command)


def _action(action: str, path: str, label: str, command: str) -> Line:
    return Line(path, ICONS[action], [(label, False)], "asks first", command)


def _marked(label: str, words: Sequence[str]) -> list[tuple[str, bool]]:
    """The label, in which these words are bold, whatever the case of their letters."""
    if not words:
        return [(label, False)]
    pattern = "|".join(re.escape(word) for word in words)
    parts = re.split(f"({pattern})", label, flags=re.IGNORECASE)
    return [(part, number % 2 == 1) for number, part in enumerate(parts) if part]
