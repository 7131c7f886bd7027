"""The words for people, each in one place: how a state, a kind of incident and an event of the
audit are shown on pages, in the terminal and in messages. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from batch_system.batch.ledger.states import IncidentKind, RunState

SHORT_DIGITS = 8
"""The digits of an id that lists show: the last ones, because ids of one time begin with the same
digits.
"""


def short(id: str) -> str:
    """The last digits of an id, by which all commands find it."""
    return id[-SHORT_DIGITS:]


def utc(at: datetime) -> str:
    """An instant in UTC as text."""
    return f"{at:%Y-%m-%d %H:%M:%S}Z"


def dates_in_words(dates: Iterable[Any]) -> str:
    """Dates that have a `date` and a `name`, such as "2026-12-25 Christmas Day"."""
    return ", ".join(f"{each.date} {each.name}".strip() for each in dates)


@dataclass(frozen=True)
class StateWord:
    """How the state of a run is shown: `icon` on pages, `style` (of rich) in a terminal."""

    icon: str
    style: str = ""


STATES = {
    RunState.WAITING: StateWord("hourglass"),
    RunState.QUEUED: StateWord("clock"),
    RunState.RUNNING: StateWord("loader-circle", "blue"),
    RunState.RETRYING: StateWord("rotate-cw", "yellow"),
    RunState.INTERRUPTED: StateWord("unplug", "magenta"),
    RunState.SUCCEEDED: StateWord("circle-check", "green"),
    RunState.FAILED: StateWord("circle-x", "red"),
    RunState.CANCELLED: StateWord("ban", "dim"),
    RunState.SKIPPED: StateWord("skip-forward", "dim"),
}
ICONS = {**{str(state): word.icon for state, word in STATES.items()}, "missed": "calendar-x"}
"""The icons of states, and of slots that have no run."""
STYLES = {str(state): word.style for state, word in STATES.items() if word.style}


@dataclass(frozen=True)
class IncidentWord:
    """How a kind of incident is named.

    `message`: the title of a message, which names the task. `heading`: of the incident's page.
    `chip`: a word beside the incident, where no number of runs is shown. `subject`: what needs a
    person, if it is not a task.
    """

    message: str
    heading: str
    chip: str = ""
    subject: str = ""


INCIDENTS = {
    IncidentKind.FAILED: IncidentWord("{task} failed", "Runs have failed"),
    IncidentKind.EMPTY: IncidentWord(
        "{task} succeeded, but its result is not as expected",
        "Runs have succeeded with nothing done",
    ),
    IncidentKind.QUARANTINE: IncidentWord(
        "{task} has put items into quarantine", "Items are in quarantine"
    ),
    IncidentKind.KEPT_BACK: IncidentWord("slots of {task} were kept back", "Slots were kept back"),
    IncidentKind.MISSED: IncidentWord("slots of {task} did not run", "Slots were missed"),
    IncidentKind.LATE: IncidentWord("{task} is late", "Slots are late"),
    IncidentKind.SLOW: IncidentWord("{task} is slow", "A run takes too long"),
    IncidentKind.AT_RISK: IncidentWord(
        "the deadline of {task} is in danger", "A deadline is in danger", chip="deadline at risk"
    ),
    IncidentKind.DEADLINE: IncidentWord(
        "{task} has missed its deadline", "A deadline was missed", chip="deadline missed"
    ),
    IncidentKind.SILENT: IncidentWord(
        "{task} has not succeeded for too long",
        "There was no success for too long",
        chip="no success",
    ),
    IncidentKind.DOWN: IncidentWord(
        "slots did not run", "No service fired", chip="alarm", subject="Service"
    ),
    IncidentKind.NODE: IncidentWord(
        "a node was lost", "A service was lost", chip="process in trouble"
    ),
    IncidentKind.FILES: IncidentWord(
        "a file of tasks can't be used", "A file of tasks can't be used", chip="file can't be used"
    ),
    IncidentKind.BACKUP: IncidentWord(
        "the backups need attention",
        "A backup can't be relied on",
        chip="alarm",
        subject="Backup",
    ),
    IncidentKind.PAUSED: IncidentWord(
        "{task} has been paused for long",
        "A pause may have been forgotten",
        chip="paused for long",
        subject="Pause",
    ),
    IncidentKind.POOL: IncidentWord(
        "a pool is not served",
        "Runs wait for a pool that no node serves",
        chip="pool not served",
    ),
    IncidentKind.LIMIT: IncidentWord(
        "the limit of {task} can't be asked",
        "The function of a limit fails",
        chip="limit not known",
    ),
    IncidentKind.UNACCOUNTED: IncidentWord(
        "slots are unaccounted for", "Slots are unaccounted for", chip="alarm", subject="Slots"
    ),
    IncidentKind.CLOCK: IncidentWord(
        "tasks don't fire, because a clock was ahead",
        "A clock was ahead",
        chip="does not fire",
        subject="Clock",
    ),
    IncidentKind.UNFIRED: IncidentWord(
        "a service lives, but does not fire",
        "A service lives, but does not fire",
        chip="alarm",
    ),
}
CHIPS = {
    **{str(kind): word.chip for kind, word in INCIDENTS.items() if word.chip},
    "disk": "alarm",
    "readiness": "not ready",
}
"""A word for each thing that needs a person: for kinds of incidents, and for findings without an
incident.
"""
SUBJECTS = {
    **{str(kind): word.subject for kind, word in INCIDENTS.items() if word.subject},
    "disk": "Disk",
}


@dataclass(frozen=True)
class EventWord:
    """How an event of the audit is shown among the changes.

    `said` follows the name of its task. `did` follows the name of the person; it has places for the
    task, for a count, and for the target of the event.
    """

    icon: str
    said: str
    did: str


EVENTS = {
    "task.pause": EventWord("circle-pause", "paused", "paused {task}"),
    "task.resume": EventWord("play", "resumed", "resumed {task}"),
    "task.change": EventWord("settings-2", "declared otherwise", ""),
    "task.mute": EventWord("bell-off", "muted", "muted {task}"),
    "task.unmute": EventWord("bell", "no longer muted", "unmuted {task}"),
    "maintenance.pause": EventWord("circle-pause", "paused together", "paused {target}"),
    "maintenance.mute": EventWord("bell-off", "muted together", "muted {target}"),
    "maintenance.end": EventWord("play", "free again", "ended the maintenance of {target}"),
    "task.backfill": EventWord("calendar-plus", "backfilled", "backfilled {task}"),
    "incident.acknowledge": EventWord(
        "check", "acknowledged", "acknowledged an incident of {task}"
    ),
    "incident.reopen": EventWord("rotate-cw", "taken up again", "took up an incident of {task}"),
    "slots.leave": EventWord(
        "check", "left as they are", "left {count} missed slots of {task} as they are"
    ),
    "slots.reopen": EventWord(
        "rotate-cw", "taken up again", "took up {count} missed slots of {task} again"
    ),
    "run.start": EventWord("hand", "run by hand", "ran {task} by hand"),
    "run.cancel": EventWord("ban", "cancelled", "cancelled a run of {task}"),
    "run.retry": EventWord("rotate-cw", "retried", "retried a run of {task}"),
    "run.retry_from_the_beginning": EventWord(
        "rotate-cw", "retried from the beginning", "retried a run of {task} from the beginning"
    ),
    "run.redrive": EventWord("repeat", "items re-driven", "re-drove items of {task}"),
    "run.acknowledge": EventWord("check", "acknowledged", "acknowledged a failed run of {task}"),
    "bulk.retry": EventWord("rotate-cw", "runs retried", "retried {count} runs of {task}"),
    "bulk.cancel": EventWord("ban", "runs cancelled", "cancelled {count} runs of {task}"),
    "bulk.acknowledge": EventWord(
        "check", "runs acknowledged", "acknowledged {count} failed runs of {task}"
    ),
    "bulk.reopen": EventWord(
        "history",
        "acknowledgement of runs undone",
        "undid the acknowledgement of {count} runs of {task}",
    ),
    "bulk.backfill": EventWord(
        "calendar-plus", "slots backfilled", "backfilled {count} slots of {task}"
    ),
    "backup.download": EventWord(
        "download", "A backup was downloaded", "downloaded the backup {target}"
    ),
    "backup.restore": EventWord("history", "A backup was restored", "restored the backup {target}"),
    "database.migrate": EventWord("database", "The database was migrated", ""),
    "backup.verify": EventWord("shield-check", "verified", "verified the backup {target}"),
    "backup.pin": EventWord("pin", "pinned", "pinned the backup {target}"),
    "backup.unpin": EventWord("pin", "no longer pinned", "unpinned the backup {target}"),
    "token.create": EventWord("key-round", "made", "made the token {target}"),
    "token.revoke": EventWord("ban", "revoked", "revoked the token {target}"),
    "session.begin": EventWord("key-round", "signed in", "signed in"),
    "session.end": EventWord("log-out", "ended", "ended the session of {target}"),
    "session.refuse": EventWord("ban", "refused", "was refused at the sign-in"),
    "alerts.test": EventWord("bell", "tried", "sent a test message to {target}"),
}


MOST_NAMED = 3
"""A text about what is kept back names at most this many tasks."""


def kept_back_in_words(kept: Sequence[Any]) -> str:
    """Such as "2 slots of load, 1 of report"; empty if nothing is kept back."""
    parts = kept_back_parts(kept)
    return ", ".join(f"{words} of {task}" if task else words for words, task in parts)


def kept_back_parts(kept: Sequence[Any]) -> list[tuple[str, str]]:
    """The same in parts: a number in words, and the name of the task; empty for the last part about
    further tasks.
    """
    parts: list[tuple[str, str]] = []
    noun_before, least = "", "at least " if any(each.at_least for each in kept) else ""
    for each in kept[:MOST_NAMED]:
        for number, noun in ((each.slots, "slot"), (each.runs, "run")):
            if number:
                named = "" if noun == noun_before else f" {noun}" if number == 1 else f" {noun}s"
                parts.append((f"{least}{number:,}{named}", each.task))
                noun_before, least = noun, ""
    others = sum(each.slots + each.runs for each in kept[MOST_NAMED:])
    if others:
        tasks = len(kept) - MOST_NAMED
        parts.append((f"{others:,} of {tasks} more task{'' if tasks == 1 else 's'}", ""))
    return parts
