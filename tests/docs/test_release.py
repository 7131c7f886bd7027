"""A release, as CONTRIBUTING.md describes it: what `make release` refuses, what it leaves, and what
a stranger sees of both distributions.
"""

from __future__ import annotations

import email
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from batch_system.config import Settings
from tests.docs.test_stranger import BLOCK, Clone

ROOT = Path(__file__).parent.parent.parent
CORE = "pyproject.toml"
WHOLE = "packaging/batch-system/pyproject.toml"
VERSION: str = tomllib.loads((ROOT / CORE).read_text())["project"]["version"]
DATED = f"## {VERSION} (2026-12-01)"
READMES = ("packaging/batch-system-core/README.md", "packaging/batch-system/README.md")
WHEELS = "tests/upgrade/wheels"
RECORDED = f"{WHEELS}/batch_system_core-{VERSION}-py3-none-any.whl"
OLDER = f"{WHEELS}/batch_system_core-0.0.1-py3-none-any.whl"
IDENTITY = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    **dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"), "a contributor"),
    **dict.fromkeys(("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "contributor@example.com"),
    **dict.fromkeys(("GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE"), "2026-12-01T12:00:00Z"),
}


class Repository:
    """A folder with commits, in which `make release` may be called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        foreign = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "SOURCE_DATE_EPOCH", "MAKEFLAGS")
        kept = {name: value for name, value in os.environ.items() if name not in foreign}
        self.environment = kept | IDENTITY

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )

    def git(self, *words: str) -> str:
        done = self.call("git", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def change(self, name: str, old: str, new: str) -> None:
        text = (self.folder / name).read_text()
        assert old in text
        (self.folder / name).write_text(text.replace(old, new))

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "Something is true now")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """What the refusals look at, with nothing to refuse."""
    for name in (CORE, WHOLE, "tools/release.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{DATED}\n\n- Begins.\n")
    repository = Repository(tmp_path)
    repository.git("init", "--quiet")
    repository.commit()
    return repository


def a_change(repository: Repository) -> str:
    repository.change("CHANGELOG.md", "Begins.", "Ends.")
    return (
        "The working tree has changes that are in no commit, such as CHANGELOG.md: "
        "commit them, or put them away."
    )


NO_SECTION = (
    f"CHANGELOG.md has no section of version {VERSION} with a date: "
    f"begin it with '## {VERSION} (YYYY-MM-DD)'."
)


def no_section(repository: Repository) -> str:
    repository.change("CHANGELOG.md", VERSION, "0.0.1")
    repository.commit()
    return NO_SECTION


def no_date(repository: Repository) -> str:
    repository.change("CHANGELOG.md", "2026-12-01", "unreleased")
    repository.commit()
    return NO_SECTION


def a_tag(repository: Repository) -> str:
    repository.git("tag", "--annotate", f"v{VERSION}", "--message", "Released")
    tagged = repository.git("rev-parse", "HEAD")[:8]
    a_change(repository)
    repository.commit()
    return (
        f"The tag v{VERSION} exists, on commit {tagged}, which is not this one: "
        "a release needs a version of its own."
    )


def another_version(repository: Repository) -> str:
    repository.change(WHOLE, f'version = "{VERSION}"', 'version = "98.0"')
    repository.commit()
    return (
        f"{CORE} has the version {VERSION}, and {WHOLE} has 98.0: "
        f"write {VERSION} there, also in each requirement."
    )


def a_requirement_of_another_version(repository: Repository) -> str:
    repository.change(WHOLE, f"[s3]=={VERSION}", "[s3]==97.0")
    repository.commit()
    return (
        f"{CORE} has the version {VERSION}, and {WHOLE} has 97.0: "
        f"write {VERSION} there, also in each requirement."
    )


@pytest.mark.parametrize(
    "make_wrong",
    [
        a_change,
        no_section,
        no_date,
        a_tag,
        another_version,
        a_requirement_of_another_version,
    ],
)
def test_what_is_no_release_is_refused_with_a_sentence_that_says_what_to_do(
    repository: Repository, make_wrong: Callable[[Repository], str]
) -> None:
    sentence = make_wrong(repository)
    refused = repository.call(sys.executable, "tools/release.py")
    assert (refused.returncode, refused.stdout, refused.stderr) == (1, "", f"{sentence}\n")
    assert not (repository.folder / "dist").exists()


@pytest.mark.parametrize("readme", READMES)
def test_the_description_on_an_index_leads_to_no_file_of_the_repository(readme: str) -> None:
    text = (ROOT / readme).read_text()
    assert len(text) > 1000
    assert re.findall(r"\]\((?!https://)[^)]*\)|<img|^\[[^\]]+\]:", text, re.MULTILINE) == []


@pytest.mark.parametrize("readme", READMES)
def test_the_task_and_the_test_in_a_description_are_run(readme: str, tmp_path: Path) -> None:
    blocks = BLOCK.finditer((ROOT / readme).read_text())
    texts = [block["text"] for block in blocks if block["language"] == "python"]
    names = ["tasks/hello.py", "tests/test_hello.py"][: len(texts)]
    for name, text in zip(names, texts, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    kept = {name: value for name, value in os.environ.items() if name not in Settings.model_fields}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=tmp_path,
            env=kept | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "you was greeted" in run("batch_system", "run", "hello", "--param", "whom=you")
    for name in names[1:]:
        assert "1 passed" in run("pytest", "-q", "-p", "no:cacheprovider", name)


def test_what_both_distributions_say_of_themselves_is_the_same() -> None:
    core, whole = (tomllib.loads((ROOT / name).read_text())["project"] for name in (CORE, WHOLE))
    same = ("version", "description", "authors", "requires-python", "keywords", "scripts", "urls")
    assert {name: core.get(name) for name in same} == {name: whole.get(name) for name in same}
    assert [*whole["classifiers"], "Typing :: Typed"] == core["classifiers"]
    extras = core["optional-dependencies"].keys() - {"web"}
    assert whole["optional-dependencies"].keys() == extras
    assert (ROOT / "LICENSE").read_text() == (ROOT / "packaging/batch-system/LICENSE").read_text()


class Release:
    """What `make release` has left in a clone."""

    def __init__(self, clone: Repository, said: str) -> None:
        self.clone = clone
        self.said = said

    @property
    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.clone.folder / "dist").iterdir()}


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Release, Release]:
    """Of one commit, in two clones."""
    return (
        released(tmp_path_factory.mktemp("first"), "022"),
        released(tmp_path_factory.mktemp("second"), "077"),
    )


def released(folder: Path, mask: str) -> Release:
    """With the libraries of this process; `make tools` installs the same there."""
    clone = Repository(Clone(folder).folder)
    (folder / OLDER).write_bytes(b"the wheel of a version that was released")
    changelog = (folder / "CHANGELOG.md").read_text()
    (folder / "CHANGELOG.md").write_text(
        re.sub(rf"^## {re.escape(VERSION)} .*$", DATED, changelog, count=1, flags=re.MULTILINE)
    )
    (folder / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (folder / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    (folder / ".venv/.python").write_text("python3\n")
    for name in (".runtime", ".dev"):
        (folder / ".venv" / name).touch()
    clone.git("init", "--quiet")
    clone.commit()
    done = clone.call("sh", "-c", f"umask {mask}; exec make release")
    assert done.returncode == 0, done.stdout + done.stderr
    return Release(clone, done.stdout)


NIGHTLY = pytest.mark.nightly  # all of it is built twice, in about two minutes


@NIGHTLY
def test_two_releases_of_one_commit_have_the_same_bytes(releases: tuple[Release, Release]) -> None:
    first, second = releases
    assert first.clone.git("rev-parse", "HEAD") == second.clone.git("rev-parse", "HEAD")
    assert [name for name, data in first.files.items() if second.files[name] != data] == []
    assert first.files.keys() == second.files.keys()


@NIGHTLY
def test_it_leaves_the_distributions_their_materials_and_the_notes(
    releases: tuple[Release, Release],
) -> None:
    names = {
        f"{distribution}-{VERSION}{end}"
        for distribution in ("batch_system", "batch_system_core")
        for end in ("-py3-none-any.whl", ".tar.gz", ".cdx.json")
    }
    notes = f"batch-system-{VERSION}.md"
    assert releases[0].files.keys() == {*names, notes}
    text = releases[0].files[notes].decode()
    assert text.startswith(f"{DATED}\n") and len(re.findall("^## ", text, re.MULTILINE)) == 1
    assert text.removeprefix(DATED) in (ROOT / "CHANGELOG.md").read_text()


@NIGHTLY
def test_the_wheel_is_recorded_and_those_of_other_versions_stay(
    releases: tuple[Release, Release],
) -> None:
    clone = releases[0].clone
    wheel = releases[0].files[Path(RECORDED).name]
    assert (clone.folder / RECORDED).read_bytes() == wheel
    assert clone.git("status", "--porcelain").split("\n") in ([f" M {RECORDED}", ""], [""])
    assert (clone.folder / OLDER).exists()


@NIGHTLY
def test_it_says_what_to_do_next_and_has_done_none_of_it(releases: tuple[Release, Release]) -> None:
    clone, said = releases[0].clone, releases[0].said
    commit = clone.git("rev-parse", "HEAD").strip()
    assert said.count("PASSED") == 4
    commands = re.findall(r"^  (\S.*)$", said, re.MULTILINE)
    assert commands[0].startswith(f"git tag --annotate v{VERSION} ")
    assert commands[0].endswith(commit)
    assert [command.split()[1] for command in commands] == [
        *("tag", "push", "-m", "add", "commit"),
    ]
    assert clone.git("tag") == ""


@NIGHTLY
@pytest.mark.parametrize(
    ("distribution", "licence", "files"),
    [
        ("batch_system", "MIT", 1),
        ("batch_system_core", "MIT AND 0BSD AND ISC AND OFL-1.1", 5),
    ],
)
def test_a_wheel_says_what_it_is_and_has_the_licences_of_what_is_in_it(
    releases: tuple[Release, Release], distribution: str, licence: str, files: int
) -> None:
    facts, names = metadata(releases[0], distribution)
    assert facts["License-Expression"] == licence
    folder = f"{distribution}-{VERSION}.dist-info/licenses/"
    licences = {f"{folder}{name}" for name in facts.get_all("License-File") or ()}
    assert len(licences) == files and licences <= names
    readme = READMES[distribution == "batch_system"]
    assert facts["Description-Content-Type"] == "text/markdown"
    assert facts.get_payload() == (ROOT / readme).read_text()
    commands = zipfile.ZipFile(wheel_of(releases[0], distribution)).read(
        f"{distribution}-{VERSION}.dist-info/entry_points.txt"
    )
    assert b"\nbatch = " in commands and b"\nbatch-system = " in commands


@NIGHTLY
@pytest.mark.parametrize("distribution", ["batch_system", "batch_system_core"])
def test_the_source_is_small_and_makes_the_same_wheel(
    releases: tuple[Release, Release], distribution: str, tmp_path: Path
) -> None:
    clone = releases[0].clone
    source = clone.folder / "dist" / f"{distribution}-{VERSION}.tar.gz"
    assert source.stat().st_size < 1_300_000
    with tarfile.open(source) as archive:
        parts = {name.split("/")[1] for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    common = {".gitignore", "LICENSE", "PKG-INFO", "pyproject.toml"}
    more = {
        "batch_system": {"README.md"},
        "batch_system_core": {"batch_system", "packaging", "CHANGELOG.md"},
    }
    assert parts == common | more[distribution]
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    epoch = clone.git("log", "-1", "--format=%ct").strip()
    subprocess.run(
        build,
        cwd=tmp_path / f"{distribution}-{VERSION}",
        env=os.environ | {"SOURCE_DATE_EPOCH": epoch},
        check=True,
        capture_output=True,
    )
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.read_bytes() == releases[0].files[wheel.name]


@NIGHTLY
@pytest.mark.parametrize(
    ("distribution", "has", "has_not"),
    [
        ("batch_system_core", {"aiosqlite", "greenlet"}, {"fastapi", "hatchling", "apprise"}),
        ("batch_system", {"aiosqlite", "batch-system-core", "fastapi"}, {"hatchling", "pip"}),
    ],
)
def test_a_bill_of_materials_has_versions_licences_and_hashes_of_what_is_installed(
    releases: tuple[Release, Release],
    distribution: str,
    has: set[str],
    has_not: set[str],
) -> None:
    text = releases[0].files[f"{distribution}-{VERSION}.cdx.json"].decode()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill: dict[str, Any] = json.loads(text)
    itself = bill["metadata"]["component"]
    assert (itself["name"], itself["version"]) == (distribution.replace("_", "-"), VERSION)
    installed = {package["name"]: package for package in bill["components"]}
    assert has <= installed.keys() and not has_not & installed.keys()
    locked = (ROOT / "requirements.lock").read_text()
    for package in (itself, *bill["components"]):
        assert package["version"] and package["licenses"]
        if package["name"].startswith("batch-system"):
            assert hashes(package) == digests(releases[0], package["name"])
        else:
            name = package["purl"].removeprefix("pkg:pypi/").replace("@", "==")
            [files] = re.findall(rf"^{re.escape(name)} (?:.*\\\n)+.*$", locked, re.MULTILINE)
            assert hashes(package) == set(re.findall(r"sha256:(\w+)", files))
    core = installed.get("batch-system-core", itself)
    contents = {part["name"]: part for part in core["components"]}
    static = ROOT / "batch_system/pages/static"
    assert len(contents) == len(list(static.rglob("*LICENSE")))
    assert contents["htmx.org"]["version"] in (static / "vendor/htmx.min.js").read_text()


@NIGHTLY
def test_a_bill_of_materials_tells_nothing_of_the_machine(
    releases: tuple[Release, Release],
) -> None:
    configured = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        check=True,
        capture_output=True,
        text=True,
    )
    hosts = re.findall(r"https?://(?:[^/@\s']*@)?([^/:\s']+)", configured.stdout)
    places = (tempfile.gettempdir(), str(ROOT), sys.prefix, "file:")
    indexes = ("pypi.", "/simple/", *hosts)
    for name, data in releases[0].files.items():
        if name.endswith(".cdx.json"):
            text = data.decode()
            assert [place for place in (*places, *indexes) if place in text] == []


def wheel_of(release: Release, distribution: str) -> Path:
    return release.clone.folder / "dist" / f"{distribution}-{VERSION}-py3-none-any.whl"


def metadata(release: Release, distribution: str) -> tuple[Message, set[str]]:
    """Its headers and description, and the names of all files of the wheel."""
    with zipfile.ZipFile(wheel_of(release, distribution)) as wheel:
        text = wheel.read(f"{distribution}-{VERSION}.dist-info/METADATA").decode()
        return email.message_from_string(text), set(wheel.namelist())


def hashes(package: dict[str, Any]) -> set[str]:
    [files] = [r for r in package["externalReferences"] if r["type"] == "distribution"]
    return {digest["content"] for digest in files["hashes"]}


def digests(release: Release, distribution: str) -> set[str]:
    name = f"{distribution.replace('-', '_')}-{VERSION}"
    files = (release.files[f"{name}{end}"] for end in ("-py3-none-any.whl", ".tar.gz"))
    return {hashlib.sha256(data).hexdigest() for data in files}
