"""Options that select runs, for `batch runs`, `batch cancel` and `batch retry`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from service.cli import complete
from service.cli.options import instant_or_age, pairs
from service.errors import InvalidParameters

if TYPE_CHECKING:
    from service.operations.asking.filter import RunFilter

OfTask = Annotated[
    str | None,
    typer.Option("--task", help="Only runs of this task.", autocompletion=complete.task_names),
]
Tag = Annotated[str | None, typer.Option("--tag", help="Only runs of tasks that have this tag.")]
OfPool = Annotated[str | None, typer.Option("--pool", help="Only runs of tasks of this pool.")]
States = Annotated[
    list[str] | None,
    typer.Option(
        "--state", help="Only runs in this state; may be repeated.", autocompletion=complete.states
    ),
]
Origins = Annotated[
    list[str] | None,
    typer.Option(
        "--origin",
        help="Only runs of this origin (schedule, manual, backfill, part); may be repeated.",
    ),
]
Since = Annotated[
    str | None,
    typer.Option(
        "--since",
        help="Only runs created since this instant (ISO 8601), or within an age such as 2h or 7d.",
    ),
]
EndedSince = Annotated[
    str | None,
    typer.Option(
        "--ended-since", help="Only runs that ended since this instant, or within an age."
    ),
]
Parameters = Annotated[
    list[str] | None,
    typer.Option(
        "--param",
        metavar="NAME=VALUE",
        help="Only runs with this parameter; may be repeated. Needs --task, --since.",
    ),
]
Error = Annotated[
    str | None,
    typer.Option(
        metavar="INCIDENT",
        help="The failed runs of this incident, and of other tasks with its error.",
    ),
]
Text = Annotated[
    str | None,
    typer.Option("--text", help="Only runs whose reason has this text. Needs --task and --since."),
]


def filter_of(
    *,
    task: str | None,
    tag: str | None,
    pool: str | None,
    state: list[str] | None,
    origin: list[str] | None,
    since: str | None,
    ended_since: str | None,
    param: list[str] | None,
    text: str | None,
) -> RunFilter:
    """The filter that these options make. Raises InvalidParameters."""
    from service.operations.asking.filter import RunFilter

    pairs(param or [])
    if (param or text is not None) and (task is None or (since is None and ended_since is None)):
        raise InvalidParameters("--param and --text need --task, and --since or --ended-since")
    return RunFilter.of(
        task=task,
        tag=tag,
        pool=pool,
        state=state or [],
        origin=origin or [],
        created_since=instant_or_age(since, "--since") if since is not None else None,
        ended_since=instant_or_age(ended_since, "--ended-since")
        if ended_since is not None
        else None,
        param=param or [],
        text=text,
    )
