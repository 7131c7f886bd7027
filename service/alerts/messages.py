"""Messages for people, made from what the outbox holds: what happened, since when, how often, what can be done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from service import escaping
from service.batch.ledger.kept_back import KeptBack, in_words
from service.batch.nodes.harm import POISON

MOST_BLOCKS = 20
"""Incidents of one message that are described; of the others only their number is said."""
LONGEST_LINE = 300
LONGEST_TITLE = 120

Content = dict[str, Any]

_TITLES: dict[str, str] = {
    "failed": "{task} failed",
    "empty": "{task} succeeded, but its result is not as expected",
    "quarantine": "{task} has put items into quarantine",
    "kept_back": "slots of {task} were kept back",
    "missed": "slots of {task} did not run",
    "late": "{task} is late",
    "slow": "{task} is slow",
    "deadline": "{task} has missed its deadline",
    "silent": "{task} has not succeeded for too long",
    "down": "no service fired",
    "node": "a node was lost",
    "files": "a file of tasks can't be used",
    "backup": "the backups need attention",
    "pool": "a pool is not served",
    "unaccounted": "slots are unaccounted for",
    "clock": "tasks don't fire, because a clock was ahead",
    "unfired": "a service lives, but does not fire",
}


@dataclass(frozen=True)
class Message:
    """A message for people. `id`: the same message has the same id whenever it is sent."""

    id: str
    title: str
    body: str


def message_of(
    message: str,
    notes: Sequence[tuple[str, Content]],
    link: Callable[[Content], str | None],
    last_lines: dict[str, str],
) -> Message:
    """The message that says all of `notes`, each its kind and its content. `last_lines`: by the id of the run."""
    blocks = [_block(kind, content, link(content), last_lines) for kind, content in notes[:MOST_BLOCKS]]
    if len(notes) > MOST_BLOCKS:
        blocks.append(f"… and {len(notes) - MOST_BLOCKS:,} more")
    return Message(message, escaping.brief(_title(notes), LONGEST_TITLE), "\n\n".join(blocks))


def _title(notes: Sequence[tuple[str, Content]]) -> str:
    if len(notes) == 1:
        return _heading(*notes[0])
    opened = [content for kind, content in notes if kind != "closed"]
    names = list(dict.fromkeys(content.get("task") or content["kind"] for content in opened))
    if not opened:
        return f"{len(notes)} incidents are over"
    named = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(opened)} incident{'' if len(opened) == 1 else 's'}: {named}"


def _heading(kind: str, content: Content) -> str:
    if kind == "test":
        return "a test message of Batch System"
    if kind == "digest":
        return str(content["title"])
    title = _TITLES.get(content["kind"], "{task}: " + content["kind"]).format(task=content.get("task") or "")
    if kind == "closed":
        return f"over: {title}, after {_age(content['opened_at'], content['closed_at'])}"
    if content["kind"] == "failed" and content["count"] > 1:
        title += f" {content['count']:,} times"
    return f"still open: {title}" if kind == "repeated" else title


def _block(kind: str, content: Content, link: str | None, last_lines: dict[str, str]) -> str:
    lines = [escaping.line(_heading(kind, content))]
    if kind == "test":
        return "\n".join([*lines, content["text"]])
    if kind == "digest":
        return escaping.lines(content["text"])
    lines.append(escaping.line(escaping.brief(content["text"], LONGEST_LINE)))
    if kind != "closed":
        if content["kind"] != "down":  # its text has the begin, and it was noticed at the end
            lines.append(f"Since {_instant(content['opened_at'])}.")
        if last := last_lines.get(content.get("run") or ""):
            lines.append(f"Last line of its log: {escaping.line(escaping.brief(last, LONGEST_LINE))}")
        if keeps := in_words([KeptBack(**each) for each in content.get("keeps_back") or ()]):
            lines.append(f"Keeps back {escaping.line(keeps)}.")
        lines += [f"{name.title()}: {escaping.line(content[name])}" for name in ("owner", "runbook") if content[name]]
        if content["kind"] == "failed" and content["run"]:
            is_poison = content["text"].startswith(POISON)
            when = "Do not retry it before that is mended. Then" if is_poison else "Retry it"
            lines.append(f"{when}: batch retry {content['run']}")
    if link is not None:
        lines.append(link)
    return "\n".join(lines)


def _instant(at: str) -> str:
    return f"{datetime.fromisoformat(at):%Y-%m-%d %H:%M} UTC"


def _age(begin: str, end: str) -> str:
    seconds = max(0, round((datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()))
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
