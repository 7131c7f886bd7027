"""What pip installs: the package, and nothing that belongs to a clone."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parent.parent.parent


def test_the_wheel_has_the_package_without_tasks_and_without_the_clones_application(
    tmp_path: Path,
) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = {PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert {name.parts[0] for name in names if ".dist-info" not in name.parts[0]} == {"service"}
    parts = {name.parts[1] for name in names if name.parts[0] == "service"}
    in_clone = {path.name for path in (ROOT / "service").iterdir() if path.name != "__pycache__"}
    assert parts == in_clone - {"application"}
    migrations = {name.stem.partition("_")[0] for name in names if name.parent.name == "versions"}
    assert migrations == {"data", "ledger"}
    assert PurePosixPath("service/shipped/backup.py") in names
