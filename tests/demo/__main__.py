"""`python -m tests.demo FOLDER` makes the demonstration; with `--serve` it is served; see
`--help`.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from pathlib import Path

from tests.demo import files, making, serving


def main() -> None:
    """The entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo", description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="where the tasks and the databases are; it may be missing"
    )
    parser.add_argument(
        "--serve", action="store_true", help="serve it, from the end of the story on"
    )
    parser.add_argument("--port", type=int, default=8000, help="the port to serve on")
    parser.add_argument(
        "command", nargs="*", help="a `batch` command to execute at the end of the story, after --"
    )
    given = parser.parse_args()
    folder = given.folder.resolve()
    if not given.serve and not given.command:
        files.write(folder)
        asyncio.run(making.make(folder))
        serving.keep(folder)
        return
    if not (folder / serving.MADE / "ledger.db").is_file():
        subprocess.run([sys.executable, "-m", "tests.demo", str(folder)], check=True)
    serving.command(folder, ["serve", "--port", str(given.port)] if given.serve else given.command)


main()
