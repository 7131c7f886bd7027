"""The lines of the Dockerfile, carried out in a folder and in a new environment. What needs a
container or root is not tried here: the base image, the user, the volume and the init.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import make_url

from tests.docs.test_deployment import FILES, ROOT, dockerfile, image_settings
from tests.processes import process

pytestmark = [pytest.mark.nightly, pytest.mark.first_start]

MODULES_OF_EXTRAS = "apprise, distributed, obstore, opentelemetry.distro, sentry_sdk"
IN_NEEDED_ORDER = re.compile(r"^(COPY|RUN) (.*)$", re.MULTILINE)


def test_what_the_image_installs_migrates_serves_and_is_healthy_with_all_extras(
    tmp_path: Path,
) -> None:
    app = tmp_path / "app"
    programs = installed(tmp_path, app)
    environment = environment_of(programs, tmp_path / "data")

    def run(*words: str) -> str:
        return subprocess.run(
            words, cwd=app, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    code = f"import batch_system, {MODULES_OF_EXTRAS}; print(batch_system.__file__)"
    assert run("python", "-c", code).startswith(str(programs.parent))
    run("batch", "migrate")
    assert "daily_report" in run("batch", "tasks")
    (command,) = dockerfile()["CMD"]
    check = re.search(r"CMD (\[.*\])$", dockerfile()["HEALTHCHECK"][0])
    assert check is not None
    words = json.loads(command)
    with process(app, [str(programs / words[0]), *words[1:]], env=environment) as serving:
        serving.wait_until_ready()
        environment["PORT"] = str(make_url(serving.url).port)
        run(*json.loads(check[1]))
        assert serving.stop() < 10


def installed(folder: Path, app: Path) -> Path:
    """The folder with the programs of a new environment that has what the image has. `app`: what
    the image has in its working directory.
    """
    context = folder / "context"
    for project in (ROOT, ROOT / "packaging/batch-system"):
        wheel = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", context / "dist"]
        subprocess.run(wheel, cwd=project, check=True, capture_output=True)
    for source in dockerfile()["COPY"]:
        for name in source.split()[:-1]:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, context / name)
            elif (ROOT / name).is_file():
                shutil.copy(ROOT / name, context / name)
    subprocess.run([sys.executable, "-m", "venv", folder / "environment"], check=True)
    programs = folder / "environment/bin"
    environment = environment_of(programs, folder / "data")
    app.mkdir()
    text = (FILES / "Dockerfile").read_text().replace("\\\n", "")
    for word, rest in IN_NEEDED_ORDER.findall(text):
        if word == "COPY":
            *sources, place = rest.split()
            target = f"{folder}{place}" if place.startswith("/") else str(app / place)
            whole = [f"{context}/{source}" for source in sources]
            folders = len(whole) == 1 and Path(whole[0]).is_dir()
            line = f"mkdir -p {target} && cp -R {whole[0]}/. {target}/"
            if not folders:
                line = f"mkdir -p {target} && cp {' '.join(whole)} {target}"
        elif "useradd" in rest:
            continue
        else:
            line = rest.replace("/wheels/", f"{folder}/wheels/")
        subprocess.run(["/bin/sh", "-c", line], cwd=app, env=environment, check=True)
    return programs


def environment_of(programs: Path, data: Path) -> dict[str, str]:
    """The environment of the container, with another folder for its volume, and a free port."""
    (data / "tmp").mkdir(parents=True, exist_ok=True)
    settings = {n: v.replace("/data", str(data)) for n, v in image_settings().items()}
    path = {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(data)}
    return {**path, **settings, "HOST": "127.0.0.1", "PORT": "0"}
