"""Makes docs/terminal.svg: what some commands print in a terminal. Takes two minutes, in which a
task fires twice.
"""

from __future__ import annotations

import contextlib
import io
import os
import pty
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).parent.parent
WIDTH = 112
COMMANDS = (
    "batch tasks",
    "batch run hello --param whom=you",
    "batch logs hello",
    'batch next "30 2 * * *" --tz Europe/Berlin --after 2027-03-27 -n 3',
    "batch account --since 3m",
)

# Rich's own has the address of a font in it.
PICTURE = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
<title>A terminal: batch tasks, batch run, batch logs, batch next and batch account</title>
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""


def main() -> None:
    console = Console(width=WIDTH, record=True, file=io.StringIO(), color_system="truecolor")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(
            ROOT / "tasks", folder / "tasks", ignore=shutil.ignore_patterns("__pycache__")
        )
        (folder / "tasks/hello.py").write_text(task_of_the_readme())
        with service(folder):
            time.sleep(121)
            for command in COMMANDS:
                console.print(Text.assemble(("$ ", "green"), (command, "bold")))
                console.print(printed_by(command, folder), end="\n\n")
    svg = console.export_svg(title="", theme=MONOKAI, code_format=PICTURE, unique_id="t")
    (ROOT / "docs/terminal.svg").write_text(svg)


def task_of_the_readme() -> str:
    text = (ROOT / "README.md").read_text()
    return text.split("<!-- file: tasks/hello.py -->\n```python\n")[1].split("```")[0]


@contextlib.contextmanager
def service(folder: Path) -> Iterator[None]:
    with (folder / "out").open("w") as out:
        command = [f"{sys.prefix}/bin/batch", "serve", "--port", "0"]
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out)
    yield
    process.terminate()
    process.wait()


def printed_by(command: str, folder: Path) -> Text:
    """What the command prints on a terminal."""
    ours, theirs = pty.openpty()
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    env = {**os.environ, "COLUMNS": str(WIDTH), "TERM": "xterm-256color", "PATH": path}
    process = subprocess.Popen(
        shlex.split(command), cwd=folder, env=env, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):  # how a terminal on Linux says that the other side has ended
        while chunk := os.read(ours, 65536):
            printed += chunk
    process.wait()
    return Text.from_ansi(printed.decode().replace("\r\n", "\n").rstrip())


main()
