"""Messages for people, made from the rows of the outbox: what happened, since when, how often, what
can be done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row

from batch_system import escaping
from batch_system.batch.incidents import problem as one_error
from batch_system.batch.ledger.chains import KeptBack
from batch_system.batch.nodes.harm import POISON
from batch_system.words import INCIDENTS, kept_back_in_words

MOST_BLOCKS = 20
"""How many incidents of one message are described. Of the others only the number is given."""
LONGEST_LINE = 300
MOST_NAMES = 10
"""How many tasks with one error are named."""
LONGEST_TITLE = 120

Content = dict[str, Any]


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
    """One message for all of `notes`, each given by its kind and its content. `last_lines`: by the
    id of the run.

    An error that several tasks have in common is described once.
    """
    problems = one_error.groups(notes, _error_of)
    blocks = [
        _block(*problem[0], link(problem[0][1]), last_lines)
        if len(problem) == 1
        else _block_of_many(problem, link(problem[0][1]))
        for problem in problems[:MOST_BLOCKS]
    ]
    if len(problems) > MOST_BLOCKS:
        blocks.append(f"… and {len(problems) - MOST_BLOCKS:,} more")
    return Message(message, escaping.brief(_title(problems), LONGEST_TITLE), "\n\n".join(blocks))


def problems_of(rows: Sequence[Row[Any]]) -> Iterator[tuple[Row[Any], dict[str, Any] | None]]:
    """Rows of the outbox, each with its problem: the problem's first incident, and its number of
    tasks.

    None if the row stands alone.
    """
    for problem in one_error.groups(rows, lambda row: _error_of((row.kind, row.content))):
        first = problem[0].content
        shown = (
            {"first": first["id"], "tasks": len(problem), "error": first["text"]}
            if len(problem) > 1
            else None
        )
        yield from ((row, shown) for row in problem)


def still_news(notes: Sequence[tuple[str, Content]]) -> list[tuple[str, Content]]:
    """The notes without incidents that have begun and ended within this one message."""
    ids = {
        kind: {content.get("id") for other, content in notes if other == kind}
        for kind in ("opened", "closed")
    }
    over = ids["opened"] & ids["closed"] - {None}
    return [(kind, content) for kind, content in notes if content.get("id") not in over]


def _error_of(note: tuple[str, Content]) -> tuple[str | None, datetime | None]:
    """A key that the notes of one problem have in common, and when the incident was opened."""
    kind, content = note
    if content.get("kind") != "failed" or content.get("error") is None:
        return None, None
    return f"{kind} {content['error']}", datetime.fromisoformat(content["opened_at"])


def _title(problems: Sequence[Sequence[tuple[str, Content]]]) -> str:
    if len(problems) == 1:
        return _heading(*problems[0][0]) if len(problems[0]) == 1 else _heading_of_many(problems[0])
    opened = [problem for problem in problems if problem[0][0] != "closed"]
    if not opened:
        return f"{len(problems)} incidents are over"
    names = [
        f"{len(problem):,} tasks"
        if len(problem) > 1
        else str(problem[0][1].get("task") or problem[0][1]["kind"])
        for problem in opened
    ]
    different = list(dict.fromkeys(names))
    named = ", ".join(different[:3]) + (", …" if len(different) > 3 else "")
    return f"{len(opened)} incident{'' if len(opened) == 1 else 's'}: {named}"


def _heading_of_many(problem: Sequence[tuple[str, Content]]) -> str:
    kind, content = problem[0]
    before = {"closed": "over: ", "repeated": "still open: "}.get(kind, "")
    return f"{before}{len(problem):,} tasks failed with one error: {content['text']}"


def _block_of_many(problem: Sequence[tuple[str, Content]], link: str | None) -> str:
    """The block about several tasks that failed with one error: the error once, the names, and one
    command for all of them.
    """
    contents = [content for _, content in problem]
    lines = [escaping.line(escaping.brief(_heading_of_many(problem), LONGEST_LINE))]
    if problem[0][0] != "closed":
        first, last = min(c["opened_at"] for c in contents), max(c["last_at"] for c in contents)
        runs = sum(content["count"] for content in contents)
        lines.append(f"{runs:,} runs from {_instant(first)} to {_instant(last)}.")
    names = sorted(content["task"] or "" for content in contents)
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    lines.append(f"Tasks: {escaping.line(', '.join(names[:MOST_NAMES]))}{more}")
    if owners := sorted({content["owner"] for content in contents if content["owner"]}):
        lines.append(f"Owners: {escaping.line(', '.join(owners[:MOST_NAMES]))}")
    if problem[0][0] != "closed":
        lines.append(f"When it is mended: batch retry --error {contents[0]['id']}")
    if link is not None:
        lines.append(link)
    return "\n".join(lines)


def _heading(kind: str, content: Content) -> str:
    if kind == "test":
        return "a test message of Batch System"
    if kind == "digest":
        return str(content["title"])
    word = INCIDENTS.get(content["kind"])
    title = (word.message if word else "{task}: " + content["kind"]).format(
        task=content.get("task") or ""
    )
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
        if content["kind"] != "down":  # its text has the beginning; it was noticed at its end
            lines.append(f"Since {_instant(content['opened_at'])}.")
        if last := last_lines.get(content.get("run") or ""):
            lines.append(
                f"Last line of its log: {escaping.line(escaping.brief(last, LONGEST_LINE))}"
            )
        kept = [KeptBack(**each) for each in content.get("keeps_back") or ()]
        if keeps := kept_back_in_words(kept):
            lines.append(f"Keeps back {escaping.line(keeps)}.")
        lines += [
            f"{name.title()}: {escaping.line(content[name])}"
            for name in ("owner", "runbook")
            if content[name]
        ]
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
    seconds = max(
        0, round((datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds())
    )
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
