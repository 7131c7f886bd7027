"""How long does a page of a table take, the further behind it is? By OFFSET, and by key as chunks
do it.

    python bench/offset.py [--rows 1000000] [--size 1000] [--rounds 7] [--picture docs/offset.svg]

Of a table in the order of its primary key, pages at 25 positions are read as ORM objects; the
figures are medians of some rounds, in which the positions take turns. `by OFFSET` is `ORDER BY id
LIMIT … OFFSET …`; `by key` is what `chunks()` executes for its next page. `all pages` is the whole
table, from the mean of these.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import uvloop
from machine import describe, print_table, version_of
from manyrows import DATABASES, Item, fill, new_url
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from batch_system import logs
from batch_system.batch.chunks.keyset_pages import Pages
from batch_system.database.engine import Database
from batch_system.testing.postgres import PostgresServer, start_server

POSITIONS = 25
Curve = list[float]
"""Milliseconds of a page at each position."""


class ByOffset:
    def __init__(self, size: int) -> None:
        self._size = size

    async def read(self, db: AsyncSession, position: int) -> Sequence[Item]:
        return (
            await db.scalars(select(Item).order_by(Item.id).limit(self._size).offset(position))
        ).all()


class ByKey:
    def __init__(self, size: int) -> None:
        self._pages: Pages[Item] = Pages(select(Item), Item.id, size)

    async def read(self, db: AsyncSession, position: int) -> Sequence[Item]:
        return (await self._pages.load(db, [position])).items


WAYS: dict[str, Any] = {"by OFFSET": ByOffset, "by key": ByKey}


def positions(options: argparse.Namespace) -> list[int]:
    """Whole pages, from the first one to the last."""
    pages = options.rows // options.size
    return [options.size * (number * (pages - 1) // (POSITIONS - 1)) for number in range(POSITIONS)]


async def measure_one(url: str, options: argparse.Namespace) -> dict[str, Curve]:
    database = Database(url, setting="DATABASE_URL")
    await fill(database, options.rows)
    took: dict[str, list[Curve]] = {way: [[] for _ in range(POSITIONS)] for way in WAYS}
    readers = {way: made(options.size) for way, made in WAYS.items()}
    for number in range(options.rounds + 1):
        for place, position in enumerate(positions(options)):
            for way, reader in readers.items():
                async with database.session(readonly=True) as db:
                    began_at = time.perf_counter()
                    found = await reader.read(db, position)
                    seconds = time.perf_counter() - began_at
                if (found[0].id, len(found)) != (position + 1, options.size):
                    raise SystemExit(
                        f"{way} read something else at {position}: the figures are worth nothing"
                    )
                if number:  # the first round is for practice
                    took[way][place].append(seconds * 1000)
    await database.dispose()
    return {way: [median(one) for one in took[way]] for way in WAYS}


async def measure(
    server: PostgresServer, options: argparse.Namespace
) -> dict[str, dict[str, Curve]]:
    return {kind: await measure_one(await new_url(server, kind), options) for kind in DATABASES}


def print_curves(curves: dict[str, dict[str, Curve]], options: argparse.Namespace) -> None:
    shown = [0, POSITIONS // 4, POSITIONS // 2, 3 * POSITIONS // 4, POSITIONS - 1]
    at = positions(options)
    rows = [["", *(f"behind {at[place]:,}" for place in shown), "all pages"]]
    for kind, ways in curves.items():
        for way, curve in ways.items():
            whole = f"{mean(curve) * options.rows / options.size / 1000:.1f} s"
            rows.append([f"{kind}, {way}", *(f"{curve[place]:.1f}" for place in shown), whole])
    print_table(
        f"A page of {options.size:,} of {options.rows:,} rows, ms, median of {options.rounds} "
        "rounds",
        rows,
    )


# The picture: plain SVG, so that it needs no library; its colours follow the reader's, light or
# dark.

STEPS = [number * ten for ten in (1, 10, 100, 1_000) for number in (1, 2, 3, 4, 5, 6, 8)]
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 320, 56, 40, 168, 44
SVG = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
<title>{title}</title>
<style>
text {{ font: 13px system-ui, sans-serif; fill: #1f2328; }}
.grid {{ stroke: #d1d9e0; }}
polyline {{ fill: none; stroke-width: 2.5; stroke-linejoin: round; }}
.offset {{ stroke: #cf222e; }} .key {{ stroke: #0969da; }}
text.offset {{ fill: #cf222e; stroke: none; }} text.key {{ fill: #0969da; stroke: none; }}
.second {{ stroke-dasharray: 6 4; }}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3; }} .grid {{ stroke: #3d444d; }}
.offset {{ stroke: #ff7b72; }} .key {{ stroke: #79c0ff; }}
text.offset {{ fill: #ff7b72; }} text.key {{ fill: #79c0ff; }}
}}
</style>
{parts}
</svg>
"""


def picture(curves: dict[str, dict[str, Curve]], options: argparse.Namespace) -> str:
    highest = max(max(curve) for ways in curves.values() for curve in ways.values())
    step = next(step for step in STEPS if highest <= 5 * step)
    at, title = (
        positions(options),
        f"Milliseconds for a page of {options.size:,} rows, by where in the table it is",
    )
    parts = [f'<text x="{LEFT}" y="20">{title}</text>']
    for number in range(6):
        y, x = _y(number / 5), _x(number / 5)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.0f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 4:.0f}" text-anchor="end">{number * step}</text>'
        )
        parts.append(
            f'<text x="{x:.0f}" y="{HEIGHT - BOTTOM + 22}" '
            f'text-anchor="middle">{number * options.rows // 5:,}</text>'
        )
    lines = [(curve, kind, way) for kind, ways in curves.items() for way, curve in ways.items()]
    ends: list[float] = []
    for curve, kind, way in sorted(lines, key=lambda line: line[0][-1]):
        colour, second = way.split()[1].lower(), " second" if kind == "SQLite" else ""
        points = [
            (_x(place / options.rows), _y(ms / step / 5))
            for place, ms in zip(at, curve, strict=True)
        ]
        drawn = " ".join(f"{x:.0f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="{colour}{second}" points="{drawn}"/>')
        y = _free(points[-1][1] + 4, ends)
        parts.append(
            f'<text class="{colour}" x="{WIDTH - RIGHT + 8}" y="{y:.0f}">{kind}, {way}</text>'
        )
    return SVG.format(width=WIDTH, height=HEIGHT, title=title, parts="\n".join(parts))


def _x(part: float) -> float:
    return LEFT + part * (WIDTH - RIGHT - LEFT)


def _y(part: float) -> float:
    return HEIGHT - BOTTOM - part * (HEIGHT - BOTTOM - TOP)


def _free(y: float, taken: list[float]) -> float:
    """Where no other line of text stands."""
    while any(abs(y - other) < 16 for other in taken):
        y -= 2
    taken.append(y)
    return y


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--size", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--picture", type=Path, help="draw the curves into this file (SVG)")
    options = parser.parse_args()
    file = options.picture and options.picture.resolve()
    logs.set_up("WARNING")
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        describe(postgresql=asyncio.run(version_of(server.url)))
        curves = uvloop.run(measure(server, options))
    print_curves(curves, options)
    if file is not None:
        file.write_text(picture(curves, options))


if __name__ == "__main__":
    main()
