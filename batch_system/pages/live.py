"""`/live`: the stream by which an open page stays up to date. Its messages are parts of the page,
as HTML.
"""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import urlencode
from weakref import WeakKeyDictionary
from zoneinfo import ZoneInfo

from starlette.requests import Request
from starlette.responses import Response

from batch_system import clock
from batch_system.operations.asking.actor import Actor, Role
from batch_system.operations.operations import Operations
from batch_system.operations.runs import log_window
from batch_system.operations.system import nodes
from batch_system.pages.frame import formatting
from batch_system.pages.frame.answers import PageRoute
from batch_system.pages.frame.blocks import FAILED, NOTE, noted
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import LiveViewer
from batch_system.pages.frame.viewer import Viewer, viewer_of
from batch_system.pages.frame.watch import Part, Watch
from batch_system.pages.night.night import BLOCKS, show_night
from batch_system.pages.runs.log_tail import LogTail
from batch_system.pages.runs.run_filter import FILTERS
from batch_system.pages.runs.runs import show_run, show_runs
from batch_system.pages.tasks.tasks import show_tasks
from batch_system.web.access import Guard
from batch_system.web.events import EventStream
from batch_system.web.live import Feed
from batch_system.web.problems import Refused
from batch_system.web.stream import Event

TOPIC = re.compile(r"night|tasks|runs|nodes|run:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
PLACE = re.compile(r"[0-9]{1,18}\.[0-9]{1,18}")
LONGEST_QUERY = 8_000
STRIP_SECONDS = 4.0
"""How often the strip is rendered: about as often as nodes beat."""
REST_SECONDS = 10.0
NIGHT_SECONDS = 20.0
KEPT_SECONDS = 60.0
MOST_WATCHED = 300
_MARK = re.compile(r"<!--part:([a-z_]+)-->")
_ROW = re.compile(r'<tr id="([^"]+)".*?</tr>', re.DOTALL)


class Source(NamedTuple):
    """A page with live parts. `parts`: blocks of its template. `feeds`: the topics whose events
    mean that it may have changed.

    `query`: the names that its address may have; others change nothing.
    `has_rows`: the rows of the tables in its blocks are sent, instead of the blocks.
    """

    show: Callable[[Request, Viewer], Awaitable[str]]
    path: str
    parts: tuple[str, ...]
    feeds: tuple[str, ...]
    query: tuple[str, ...]
    rest_seconds: float = REST_SECONDS
    slow: tuple[str, ...] = ()
    has_rows: bool = False


NIGHT = Source(
    show_night,
    "/",
    BLOCKS,
    ("runs", "tasks"),
    ("since", "until"),
    NIGHT_SECONDS,
    ("p-chart", "p-lanes"),
)
TASKS_QUERY = ("show", "text", "range", "group", "lanes", "first")
SOURCES = {
    "night": NIGHT,
    "tasks": Source(show_tasks, "/tasks", ("rows",), ("tasks", "runs"), TASKS_QUERY, has_rows=True),
    "runs": Source(
        show_runs,
        "/runs",
        ("rows",),
        ("runs",),
        (*FILTERS, "after", "fold", "unfold"),
        has_rows=True,
    ),
    "run": Source(show_run, "/runs", ("head", "progress", "attempts", "facts"), (), ()),
}


class Kind(NamedTuple):
    """Viewers who get the same bytes, because they see the same page in the same zone, with the
    same role.
    """

    topic: str
    query: str
    zone: str
    root: str
    role: Role


@dataclass(eq=False)
class Watches:
    """The pages that are watched in one process."""

    operations: Operations
    token: str = field(default_factory=lambda: secrets.token_hex(4))
    numbers: itertools.count[int] = field(default_factory=itertools.count)
    pages: dict[Kind, tuple[str, Watch]] = field(default_factory=dict)
    tails: dict[Kind, LogTail] = field(default_factory=dict)

    def page(self, kind: Kind) -> tuple[str, Watch]:
        """The watch of a page, with a name that is never used for another one."""
        if kind not in self.pages:
            self._forget()
            self.pages[kind] = f"{self.token}{next(self.numbers)}", _watch_of(self.operations, kind)
        return self.pages[kind]

    def tail(self, kind: Kind) -> LogTail:
        """The end of the log of a run."""
        return self.tails.setdefault(kind, LogTail(partial(_lines, self.operations, kind)))

    def _forget(self) -> None:
        """Forget pages that were not watched for a while."""
        oldest = clock.monotonic() - KEPT_SECONDS
        for kind in [kind for kind, (_, watch) in self.pages.items() if watch.used_at < oldest]:
            del self.pages[kind]
            self.tails.pop(kind, None)
        while len(self.pages) >= MOST_WATCHED:  # who watches one that is forgotten keeps it
            oldest_kind = min(self.pages, key=lambda kind: self.pages[kind][1].used_at)
            del self.pages[oldest_kind]
            self.tails.pop(oldest_kind, None)


_all_watches: WeakKeyDictionary[Feed, Watches] = WeakKeyDictionary()


def _watch_of(operations: Operations, kind: Kind) -> Watch:
    if kind.topic == "nodes":
        return Watch(partial(_strip, operations, kind), STRIP_SECONDS)
    source = SOURCES[kind.topic.partition(":")[0]]
    return Watch(
        partial(_page, operations, kind, source, {}),
        source.rest_seconds,
        source.slow,
        ("new-rows",),
    )


def _viewer(
    operations: Operations, kind: Kind, here: str, parts: tuple[str, ...] = ()
) -> LiveViewer:
    """A viewer with what all viewers who share the bytes have in common, and nothing that belongs
    to one of them.
    """
    actor = Actor("", kind.role, "page")
    now, zone = clock.now(), ZoneInfo(kind.zone)
    return LiveViewer(
        actor, operations.by(actor), zone, "auto", None, kind.root, here, "", now, parts=parts
    )


async def _strip(operations: Operations, kind: Kind) -> Sequence[Part]:
    viewer = _viewer(operations, kind, "/")
    around = await nodes.around(viewer.operations.context)
    html = await render("strip.html", viewer=viewer, root=kind.root, around=around)
    return [Part("nodes", "innerMorph", html)]


async def _page(
    operations: Operations, kind: Kind, source: Source, kept: dict[str, tuple[str, str]]
) -> Sequence[Part]:
    """`kept`: each block as it was last rendered, and when, to be shown if it can't be rendered
    now.
    """
    run = kind.topic.partition(":")[2]
    path = f"{source.path}/{run}" if run else source.path
    viewer = _viewer(operations, kind, f"{path}?{kind.query}" if kind.query else path, source.parts)
    scope: dict[str, Any] = {
        "type": "http",
        "method": "GET",
        "path": path,
        "root_path": kind.root,
        "headers": [],
    }
    scope |= {"query_string": kind.query.encode(), "path_params": {"run": run} if run else {}}
    html = await source.show(Request(scope), viewer)
    if source.has_rows:
        rows = [Part(found[1], "outerMorph", found[0]) for found in _ROW.finditer(html)]
        return [*rows, _hint(rows)]
    names = _MARK.split(html)[1:]
    blocks = {name: text.strip() for name, text in zip(names[::2], names[1::2], strict=True)}
    for name, text in blocks.items():
        if not text.startswith(FAILED):
            kept[name] = text, formatting.clock(viewer.now, viewer.zone, True)
        elif name in kept:
            blocks[name] = noted(
                kept[name][0], await render(NOTE, viewer=viewer, name=name, at=kept[name][1])
            )
    return [Part(f"p-{name}", "innerMorph", text) for name, text in blocks.items()]


def _hint(rows: Sequence[Part]) -> Part:
    """The hint that the table would have other rows by now: rows do not move while somebody reads
    them.
    """
    key = hash(tuple(row.target for row in rows)) & 0xFFFFFFFF
    return Part(
        "new-rows",
        "innerHTML",
        f'<button class="btn s" data-reload="{key}">The list has changed: show</button>',
    )


async def _lines(operations: Operations, kind: Kind, place: str, most: int) -> tuple[str, str]:
    viewer = _viewer(operations, kind, "/")
    run = kind.topic.partition(":")[2]
    found = await log_window.following(viewer.operations.context, run, place, most)
    if not found.lines:
        return "", found.after
    shown = {
        "lines": found.lines,
        "numbers": found.numbers,
        "run": run,
        "root": kind.root,
        "text": "",
    }
    return await render("log_lines.html", viewer=viewer, **shown), found.after


class PageStream(EventStream):
    """Sends the parts of a page that have changed, and the strip of nodes that is on each page."""

    def __init__(
        self, request: Request, viewer: Viewer, watches: Watches, topic: str, query: str, place: str
    ) -> None:
        kind = Kind(topic, query, str(viewer.zone), viewer.root, viewer.actor.role)
        self._strip = watches.page(kind._replace(topic="nodes", query=""))[1]
        self._page = self._tail = None
        self._name = ""
        self._seen = 0
        self._seen_strip = 0
        self._place = place
        self._first: list[bytes] = []
        last_id = request.headers.get("last-event-id", "")[:100]
        if topic != "nodes":
            self._name, self._page = watches.page(kind)
            name, _, rest = last_id.partition("-")
            version, _, last_place = rest.partition("-")
            if PLACE.fullmatch(last_place):
                self._place = last_place
            if name == self._name and version.isdecimal() and len(version) < 10:
                self._seen = int(version)
            elif last_id:
                self._first = [b"event: reload\ndata:\n\n"]
        if topic.startswith("run:") and self._place:
            self._tail = watches.tail(kind)
        source = SOURCES.get(topic.partition(":")[0])
        feeds: Collection[str] = (
            (*source.feeds, topic)
            if topic.startswith("run:") and source
            else (source or NIGHT).feeds
        )
        topics = frozenset(feeds if self._page is not None else ()) | {"nodes"}
        super().__init__(request, topics, viewer.actor.token or viewer.actor.name, None)

    async def texts_of(self, events: Sequence[Event]) -> Sequence[bytes]:
        """What has changed since this client got something."""
        texts = self._first
        self._first = []
        await self._strip.refresh()
        if self._page is not None:
            self._page.note([event for event in events if event.topic != "nodes"])
            await self._page.refresh()
        data, is_fresh = b"", self._page is None or self._page.is_fresh
        if self._strip.is_fresh and is_fresh:  # any message marks the page as fresh
            data = self._strip.changes(self._seen_strip)
            self._seen_strip = self._strip.version
        if self._page is not None and is_fresh:
            data += self._page.changes(self._seen)
            self._seen = self._page.version
        if self._tail is not None:
            more = await self._tail.after(self._place)
            data += more.data
            self._place = more.place
        if data:
            texts.append(f"id: {self._name}-{self._seen}-{self._place}\n".encode() + data + b"\n")
        return texts

    def ping(self) -> bytes:
        """The time of the service. Without fresh data it is left out, so that the page says that it
        is old.
        """
        is_fresh = self._strip.is_fresh and (self._page is None or self._page.is_fresh)
        return (
            f"event: beat\ndata: {clock.now().isoformat()}\n\n".encode()
            if is_fresh
            else b": ping\n\n"
        )


async def _live(request: Request) -> Response:
    guard: Guard = request.app.guard
    viewer = await viewer_of(request, guard)
    if guard.feed.stopping.is_set():
        raise Refused(503, "the service is stopping")
    topic = request.query_params.get("topic", "nodes")
    place = request.query_params.get("after_line", "")
    query = _query_of(topic, request.query_params.multi_items())
    if (
        TOPIC.fullmatch(topic) is None
        or len(query) > LONGEST_QUERY
        or (place and PLACE.fullmatch(place) is None)
    ):
        raise Refused(
            422,
            "allowed is what a page of this service asks for: topic, after_line, and its own query",
        )
    watches = _all_watches.setdefault(guard.feed, Watches(guard.operations))
    return PageStream(request, viewer, watches, topic, query, place)


def _query_of(topic: str, given: Sequence[tuple[str, str]]) -> str:
    """The part of the query that determines what the page shows. Other names would only make more
    pages to watch.
    """
    source = SOURCES.get(topic.partition(":")[0])
    known = source.query if source is not None else ()
    return urlencode(sorted((name, value) for name, value in given if name in known))


live = PageRoute("/live", _live, methods=["GET"], include_in_schema=False)
