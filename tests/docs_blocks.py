"""The code blocks of the documents, and what is done with them.

The HTML comment right above a block says what it is:

    file: NAME      a file that this block is; blocks of one page share a folder
    add to: NAME    what is added to the end of one of our own files
    sql: NAME       a statement on the ledger
    not run: WHY    only shown

A Python block without one is run as a script in the page's folder, with the tables made.

An `http` block is a request and the answer to it, divided by a blank line; tests/docs/test_api.py
sends the request.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent

ELSEWHERE = {
    "docs/testing.md": "tests/testing/test_plugin.py",
    "docs/waiting.md": "tests/waiting/test_waiting_page.py",
    "docs/partitions.md": "tests/partitions/test_partitions_page.py",
    "docs/apps.md": "tests/docs/test_apps.py",
    "docs/apps-project.md": "tests/tasks/test_shipped.py",
}
"""Pages whose Python is run by a test of their own."""


@cache
def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pages() -> list[str]:
    return [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


def documentation() -> str:
    return "\n".join(read(name) for name in ["README.md", *pages()])


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    note: str
    """The HTML comment right above it."""

    @property
    def is_run(self) -> bool:
        return not self.note.startswith("not run: ")

    @property
    def file(self) -> str | None:
        return self._named("file: ")

    @property
    def addition(self) -> str | None:
        return self._named("add to: ")

    @property
    def statement(self) -> str | None:
        return self._named("sql: ")

    def _named(self, kind: str) -> str | None:
        return self.note.removeprefix(kind) if self.note.startswith(kind) else None


def blocks(text: str, language: str | None = None) -> list[Block]:
    found = re.findall(
        r"(?:<!-- (.*?) -->\n)?^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    )
    return [Block(kind, code, note) for note, kind, code in found if language in (None, kind)]


def sessions(blocks: list[Block]) -> Iterator[tuple[str, str]]:
    """Each command of console blocks with the output that is shown below it."""
    for block in blocks:
        for session in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
            command, _, output = session.partition("\n")
            yield command, output


@dataclass(frozen=True)
class Message:
    """A request or an answer: its first line, its headers by their names in small letters, and its
    body.
    """

    start: str
    headers: dict[str, str]
    body: str

    @classmethod
    def of(cls, text: str) -> Message:
        start, _, rest = text.partition("\n")
        headers = re.match(r"(?:[A-Za-z-]+: .*\n)*", rest)
        assert headers is not None
        named = (line.split(": ", 1) for line in headers[0].splitlines())
        return cls(
            start, {name.lower(): value for name, value in named}, rest[headers.end() :].strip()
        )


def exchanges(text: str) -> Iterator[tuple[Message, Message]]:
    """Each request of the `http` blocks with the answer that is shown. The answer begins with its
    status.
    """
    for block in blocks(text, "http"):
        request, answer = re.split(r"\n\n(?=\d{3} )", block.code)
        yield Message.of(f"{request}\n"), Message.of(answer)


def words_of(command: str) -> list[str]:
    """The words of a `batch` command after that one, up to a pipe or a redirection."""
    words = shlex.split(command, comments=True)[1:]
    end = next(
        (place for place, word in enumerate(words) if word in {"|", ">", ">>", "&&", "&"}),
        len(words),
    )
    return words[:end]


def masked(output: str) -> list[str]:
    """Lines without the parts that differ each time: instants, ids, durations, the port, and so the
    widths of columns.
    """
    output = re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?Z?", "AT", output)
    output = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", output)
    output = re.sub(r"^[0-9a-f]{8}(?=  )", "SHORT-ID", output, flags=re.MULTILINE)
    output = re.sub(r"127\.0\.0\.1:\d+", "HOST", output)
    return re.sub(r"\d+\.\d\d s", "TIME", output).splitlines()


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def rows(text: str) -> dict[str, list[str]]:
    """The cells of each table row whose first one is a name in backquotes, by that name. The first
    of a name counts.
    """
    listed: dict[str, list[str]] = {}
    for name, cells in re.findall(r"^\| `([^`|]+)` \|(.*)\|$", without_code(text), re.MULTILINE):
        listed.setdefault(name, [cell.strip() for cell in cells.split("|")])
    return listed


def section(page: str, heading: str) -> str:
    """From a heading to the next one of its level."""
    level = heading.split(" ")[0]
    return re.split(rf"^{level} ", read(page).split(f"\n{heading}\n")[1], flags=re.MULTILINE)[0]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(name: str) -> list[str]:
    """Links to files that are not there, and to headings that their page does not have."""
    wrong = []
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", without_code(read(name))):
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        if not path.exists() or (
            anchor and anchor not in anchors(path.read_text(encoding="utf-8"))
        ):
            wrong.append(target)
    return wrong
