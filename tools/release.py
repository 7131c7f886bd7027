"""Makes what a release consists of, in the folder `dist`: `make release`.

It builds both distributions of the version in pyproject.toml, checks them, writes for each of them
what it installs (a bill of materials, SBOM) and what has changed, and records the wheel for the
test of the next version beside it. It tags and publishes nothing: it prints the commands that do.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
CORE = ROOT / "pyproject.toml"
WHOLE = ROOT / "packaging/batch-system/pyproject.toml"
LOCK = ROOT / "requirements.lock"
RECORDED = ROOT / "tests/upgrade/wheels"
CONTENTS = {"htmx.org": "0BSD", "Lucide": "ISC", "Inter": "OFL-1.1", "JetBrains Mono": "OFL-1.1"}
"""What the wheel of the core has of others, in `batch_system/pages/static`, with its licence."""
HTMX = ROOT / "batch_system/pages/static/vendor/htmx.min.js"


class ReleaseRefused(Exception):
    """A release that would not be what its version says."""


def main() -> None:
    os.chdir(ROOT)
    try:
        version = version_of_both()
        notes = notes_of(version)
        refuse_changes()
        refuse_tag(version)
        commit, committed_at = said("git", "log", "-1", "--format=%H %ct").split()
        os.environ["SOURCE_DATE_EPOCH"] = committed_at  # two builds of a commit are the same
        call("make", "--no-print-directory", "dist")
        call(sys.executable, "-m", "twine", "check", "--strict", *sorted(map(str, DIST.iterdir())))
        write_materials(version)
    except ReleaseRefused as refused:
        sys.exit(str(refused))
    except subprocess.CalledProcessError as failed:
        sys.exit(f"There is no release, because this has failed: {' '.join(failed.cmd)}")
    (DIST / f"batch-system-{version}.md").write_text(notes)
    shutil.copy(wheel_of("batch-system-core", version), RECORDED)
    print(NEXT.format(version=version, commit=commit))
    if "urls" not in project(CORE):
        print(NO_ADDRESS)


NEXT = """
The folder dist has version {version}, of commit {commit}:
the distributions, their bills of materials (.cdx.json) and the notes. Nothing was published. Next:

  git tag --annotate v{version} --message 'Version {version}' {commit}
  git push origin v{version}

Then CI publishes it; where none does:

  .venv/bin/python -m twine upload dist/*.whl dist/*.tar.gz

At last, for the test of the next version beside this one:

  git add tests/upgrade/wheels
  git commit --message 'The wheel of {version} is recorded'
"""
NO_ADDRESS = """\
An index will not show where this project lives: before the first release, name its addresses in
[project.urls] of both files pyproject.toml."""


def version_of_both() -> str:
    version: str = project(CORE)["version"]
    pins = re.findall(r'"batch-system-core\[\w+\]==(.+?)"', WHOLE.read_text())
    others = {project(WHOLE)["version"], *pins} - {version}
    if others:
        raise ReleaseRefused(
            f"{CORE.name} has the version {version}, and {WHOLE.relative_to(ROOT)} has "
            f"{' and '.join(sorted(others))}: write {version} there, also in each requirement."
        )
    return version


def notes_of(version: str) -> str:
    """The section of this version in the changelog, which has a date."""
    for section in re.split(r"^(?=## )", Path("CHANGELOG.md").read_text(), flags=re.MULTILINE):
        if re.match(rf"## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)\n", section):
            return section
    raise ReleaseRefused(
        f"CHANGELOG.md has no section of version {version} with a date: "
        f"begin it with '## {version} (YYYY-MM-DD)'."
    )


def refuse_changes() -> None:
    changes = said("git", "status", "--porcelain").splitlines()
    if changes:
        raise ReleaseRefused(
            f"The working tree has changes that are in no commit, such as {changes[0][3:]}: "
            "commit them, or put them away."
        )


def refuse_tag(version: str) -> None:
    """The tag may be that of this commit: CI builds what was tagged, and gets the same files."""
    if f"v{version}" in said("git", "tag").split():
        tagged, head = said("git", "rev-parse", f"v{version}^{{commit}}", "HEAD").split()
        if tagged != head:
            raise ReleaseRefused(
                f"The tag v{version} exists, on commit {tagged[:8]}, which is not this one: "
                "a release needs a version of its own."
            )


def write_materials(version: str) -> None:
    """For each distribution, what pip installs with it here, in the versions of the lock."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder, "environment")
        venv.create(environment)
        python = str(environment / "bin/python")
        versions = Path(folder, "versions.txt")
        versions.write_text(re.sub(r" \\\n +--hash=\S+", "", LOCK.read_text()))
        hashes = hashes_of_files(version)
        install = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
        for file in (CORE, WHOLE):  # the second one adds to what the first one has installed
            name = project(file)["name"]
            wheel = wheel_of(name, version)
            call(*install, "--no-compile", "--constraint", str(versions), str(wheel))
            bill = cyclonedx("environment", "--pyproject", str(file), "--mc-type=library", python)
            complete(bill, hashes)
            to = DIST / f"{wheel.name.removesuffix('-py3-none-any.whl')}.cdx.json"
            to.write_text(json.dumps(bill, indent=2) + "\n")


def hashes_of_files(version: str) -> dict[str, list[dict[str, str]]]:
    """By package URL, those of all files of a version: other platforms install other ones."""
    lines = [LOCK.read_text()]
    for file in (CORE, WHOLE):
        wheel = wheel_of(project(file)["name"], version)
        source = wheel.with_name(wheel.name.replace("-py3-none-any.whl", ".tar.gz"))
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (wheel, source)]
        own = [f"{project(file)['name']}=={version}", *(f"--hash=sha256:{d}" for d in digests)]
        lines.append(" ".join(own) + "\n")
    return {
        package["purl"]: package["externalReferences"][0]["hashes"]
        for package in cyclonedx("requirements", "-", given="".join(lines))["components"]
    }


def cyclonedx(*words: str, given: str | None = None) -> dict[str, Any]:
    """Of packages, it names neither the index nor the path that they came from."""
    options = ("--short-PURLs", "--output-reproducible", "--sv=1.6")
    command = (sys.executable, "-m", "cyclonedx_py", *words, *options)
    return json.loads(said(*command, given=given))  # type: ignore[no-any-return]


def complete(bill: dict[str, Any], hashes: dict[str, list[dict[str, str]]]) -> None:
    """Add hashes and contents, and leave out from where this machine got the files."""
    for tool in bill["metadata"]["tools"]["components"]:
        del tool["externalReferences"]
    for package in (bill["metadata"]["component"], *bill["components"]):
        address = package.setdefault("purl", f"pkg:pypi/{package['name']}@{package['version']}")
        if address not in hashes:
            raise ReleaseRefused(f"{LOCK.name} does not have {address}: make lock.")
        told = [r for r in package.get("externalReferences", ()) if r["type"] != "distribution"]
        files = {"type": "distribution", "url": address, "hashes": hashes[address]}
        package["externalReferences"] = [*told, files]
        if package["name"] == "batch-system-core":
            package["components"] = contents()


def contents() -> list[dict[str, Any]]:
    [htmx] = re.findall(r'version="([\d.]+)"', HTMX.read_text())
    found: list[dict[str, Any]] = [
        {"type": "library", "name": name, "licenses": [{"license": {"id": licence}}]}
        for name, licence in CONTENTS.items()
    ]
    found[0] |= {"version": htmx, "purl": f"pkg:npm/htmx.org@{htmx}"}
    return found


def project(file: Path) -> dict[str, Any]:
    return tomllib.loads(file.read_text())["project"]  # type: ignore[no-any-return]


def wheel_of(name: str, version: str) -> Path:
    return DIST / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"


def call(*words: str) -> None:
    subprocess.run(words, check=True)


def said(*words: str, given: str | None = None) -> str:
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, input=given).stdout


if __name__ == "__main__":
    main()
