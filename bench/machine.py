"""What a bench prints around its figures: the machine, the versions, and tables."""

from __future__ import annotations

import os
import platform
import sqlite3
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import asyncpg

LIBRARIES = ("apscheduler", "sqlalchemy", "asyncpg", "aiosqlite", "uvloop")


def describe(libraries: Sequence[str] = LIBRARIES, postgresql: str | None = None) -> None:
    """Print what the figures below it were measured on. `postgresql`: what the server says of
    itself.
    """
    load = f"; load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    print(f"{_cpu()}, {os.cpu_count()} cores, {_memory()}{load}")
    print(f"{_system()}; {platform.python_implementation()} {platform.python_version()}")
    print(", ".join(f"{name} {version(name)}" for name in libraries))
    print(
        f"SQLite {sqlite3.sqlite_version}"
        + (f", PostgreSQL {postgresql} (default settings)" if postgresql else "")
    )


def print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """The first row is the head; the first column is words, the others are figures."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{title}")
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join(cells).rstrip(), flush=True)


async def version_of(url: str) -> str:
    """Of the PostgreSQL server at this URL of SQLAlchemy's."""
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        return str(await connection.fetchval("SHOW server_version"))
    finally:
        await connection.close()


def _cpu() -> str:
    models = [
        line.partition(":")[2].strip()
        for line in _lines("/proc/cpuinfo")
        if line.startswith("model name")
    ]
    return models[0] if models else platform.processor() or platform.machine()


def _memory() -> str:
    kilobytes = [
        int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")
    ]
    return f"{kilobytes[0] / 2**20:.0f} GB" if kilobytes else "memory unknown"


def _system() -> str:
    names = [
        line.partition("=")[2].strip('"')
        for line in _lines("/etc/os-release")
        if line.startswith("PRETTY_NAME")
    ]
    return f"{names[0] if names else platform.system()}, kernel {platform.release()}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
