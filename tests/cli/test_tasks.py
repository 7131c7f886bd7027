"""`batch lint` and `batch new`, what a shell completes, and what the help says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from batch_system import clock
from batch_system.cli.examples import EXAMPLES
from batch_system.cli.new import START
from batch_system.testing import kit
from tests import preloaded
from tests.commands import Batch, in_this_process, refuses
from tests.processes import BATCH, ROOT, environment
from tests.processes import batch as command

OCTOBER = datetime(2026, 10, 24, 12, tzinfo=UTC)

REPORT = """
from batch_system import BaseTask

class Report(BaseTask):
    name, schedule, timezone = "report", "30 2 * * *", "Europe/Berlin"
    async def run(self): ...
"""


@pytest.fixture
def batch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    yield from in_this_process(capsys, monkeypatch)


@pytest.fixture
def report(tmp_path: Path) -> Path:
    file = tmp_path / "tasks" / "report.py"
    file.write_text(REPORT)
    return file


# lint


def test_lint_shows_the_next_times_and_marks_a_clock_change(batch: Batch, report: Path) -> None:
    with clock.moved(OCTOBER):
        done = batch("lint", "-n", "2")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        "report (tasks/report.py)",
        "  At 02:30 every day (Europe/Berlin)",
        "    2026-10-25 00:30:00Z  2026-10-25 02:30:00+02:00  02:30 comes twice on 2026-10-25: "
        "fires the first time",
        "    2026-10-26 01:30:00Z  2026-10-26 02:30:00+01:00",
        "",
        "1 task, 0 errors, 0 warnings, 1 note",
    ]


def test_lint_looks_a_year_ahead_for_a_clock_change(batch: Batch, report: Path) -> None:
    with clock.moved(datetime(2026, 11, 25, tzinfo=UTC)):
        done = batch("lint")
    assert (
        "  note: 02:30 is skipped by the clock change of 2027-03-28: fires at 03:00"
        in done.out.splitlines()
    )
    assert len(re.findall(r"^    2026-1", done.out, re.MULTILINE)) == 5


def test_lint_ends_with_code_1_where_there_is_a_warning(
    batch: Batch, report: Path, database_url: str
) -> None:
    report.write_text(REPORT.replace('"30 2 * * *"', '"* 2 * * *"'))
    done = batch("lint", LEDGER_URL="postgresql://nobody@127.0.0.1:1/x")  # it asks no database
    assert done.code == 1
    assert (
        "  warning: it fires 60 times in one hour; '0 2 * * *' fires once" in done.out.splitlines()
    )
    assert done.out.endswith("1 task, 0 errors, 1 warning, 1 note\n")


def test_a_file_that_can_not_be_used_is_an_error(
    batch: Batch, report: Path, tmp_path: Path
) -> None:
    (tmp_path / "tasks" / "broken.py").write_text("import nowhere\n")
    done = batch("lint")
    assert done.code == 1
    shown = done.out.splitlines()
    assert shown[shown.index("tasks/broken.py") + 1] == (
        "  error: ModuleNotFoundError in line 1: No module named 'nowhere'"
    )
    assert done.out.endswith("1 task, 1 error, 0 warnings, 1 note\n")


def test_a_task_that_waits_for_one_that_nobody_knows_is_an_error(
    batch: Batch, report: Path, tmp_path: Path
) -> None:
    """And a task without a schedule of its own shows the next slots of the one that it follows."""
    text = (
        "from batch_system import BaseTask\nclass Load(BaseTask):\n    name, after = 'load', {}\n"
        "    def run(self): ...\n"
    )
    (tmp_path / "tasks" / "load.py").write_text(text.format("('report', 'rates')"))
    done = batch("lint", "load", "-n", "1")
    assert done.code == 1
    assert done.out.splitlines()[1].startswith("  The slots of report: ")
    assert "  error: there is no task rates" in done.out.splitlines()
    assert [len(task["next"]) for task in batch("lint", "--json", "-n", "2").json] == [2, 2]


def test_tasks_that_wait_for_each_other_are_an_error_with_their_names(
    batch: Batch, report: Path, tmp_path: Path
) -> None:
    text = (
        "from batch_system import BaseTask\nclass {0}(BaseTask):\n    name, after = '{0}', '{1}'\n"
        "    def run(self): ...\n"
    )
    for name, other in (("A", "B"), ("B", "A")):
        (tmp_path / "tasks" / f"{name.lower()}.py").write_text(
            text.format(name.lower(), other.lower())
        )
    for shows in ("lint", "tasks"):
        done = batch(shows)
        assert done.code == 1
        assert "tasks wait for each other: " in done.out + done.err


def test_lint_as_json_has_rules_for_programs(batch: Batch, report: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks" / "broken.py").write_text("import nowhere\n")
    with clock.moved(OCTOBER):
        good, bad = batch("lint", "--json", "-n", "1").json
    assert (good["task"], good["source"], good["schedule"]) == (
        "report",
        "tasks/report.py",
        "30 2 * * *",
    )
    assert good["next"] == [
        {
            "slot": "2026-10-25T00:30:00Z",
            "local": "2026-10-25T02:30:00+02:00",
            "mark": "02:30 comes twice on 2026-10-25: fires the first time",
        }
    ]
    assert [(f["severity"], f["rule"]) for f in good["findings"]] == [("note", "clock-change")]
    assert (bad["task"], bad["source"], bad["findings"][0]["rule"]) == (
        None,
        "tasks/broken.py",
        "broken",
    )
    assert list(good) == list(bad)


NO_RUN = """
from batch_system import BaseTask

class Typo(BaseTask):
    name, schedule = "typo", "0 1 * * *"
    async def rnu(self): ...
"""


def test_a_class_without_run_is_named_by_lint_and_by_tasks(
    batch: Batch, report: Path, tmp_path: Path
) -> None:
    (tmp_path / "tasks" / "typo.py").write_text(NO_RUN)
    sentence = "class Typo has a name and no run(), so it is no task"
    done = batch("lint")
    assert done.code == 1 and f"tasks/typo.py\n  error: {sentence}\n" in done.out
    done = batch("tasks")
    assert done.code == 1 and f"batch: tasks/typo.py can't be used: {sentence}\n" in done.err
    assert re.search(rf"^typo +.* tasks/typo\.py +{re.escape(sentence)}$", done.out, re.MULTILINE)
    _, typo = batch("tasks", "--json").json
    assert (typo["name"], typo["source"], typo["error"]) == ("typo", "tasks/typo.py", sentence)


def test_a_task_whose_cron_in_the_settings_is_bad_is_listed_with_its_error(
    batch: Batch, tmp_path: Path
) -> None:
    (tmp_path / "tasks" / "backup.py").write_text((ROOT / "tasks" / "backup.py").read_text())
    (tmp_path / ".env").write_text("BACKUP_CRON=61 * * * *\n")
    done = batch("tasks")
    [line] = done.out.splitlines()[1:]
    assert (
        done.code == 1
        and line.startswith("backup ")
        and "'61 * * * *'" in line
        and "minute" in line
    )


def test_other_files_that_are_broken_take_one_line_each_of_a_run(
    batch: Batch, report: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / "tasks" / f"{name}.py").write_text(f"import nowhere_{name}\n")
    done = batch("run", "report")
    assert done.code == 0 and "Traceback" not in done.err
    told = [line for line in done.err.splitlines() if "nowhere" in line]
    assert [re.findall(r"tasks/\w+\.py", line) for line in told] == [
        ["tasks/one.py"],
        ["tasks/two.py"],
    ]


@pytest.mark.first_start
@pytest.mark.parametrize("schedule", ['"30 2 * * *"', "None"])
def test_a_pause_is_shown_where_no_service_ever_ran(
    batch: Batch, report: Path, schedule: str
) -> None:
    report.write_text(REPORT.replace('"30 2 * * *"', schedule))
    assert batch("run", "report").code == 0
    assert batch("pause", "report", "--json").json["is_new"]
    done = batch("tasks")
    assert (
        done.out.splitlines()[0].split()[-2:] == ["paused", "source"]
        and " yes " in done.out.splitlines()[1]
    )
    [task] = batch("tasks", "--json").json
    assert (task["paused"], task["next_run_time"]) == (True, None)
    assert batch("resume", "report").code == 0
    assert not batch("tasks", "--json").json[0]["paused"]


@pytest.mark.parametrize(
    "words",
    [
        *(
            "run reprot",
            "run reprot --queue",
            "pause reprot",
            "show reprot",
            "logs reprot",
            "lint reprot",
        ),
        *("cancel reprot", "runs --task reprot", "account --task reprot"),
    ],
)
def test_a_name_that_is_mistyped_is_answered_with_a_similar_one(
    batch: Batch, report: Path, words: str
) -> None:
    assert batch("run", "report").code == 0
    refuses(batch(*words.split()), "'reprot'", "(did you mean report?)")


def test_lint_of_named_tasks_leaves_the_others_out(
    batch: Batch, report: Path, tmp_path: Path
) -> None:
    (tmp_path / "tasks" / "broken.py").write_text("import nowhere\n")
    (tmp_path / "tasks" / "other.py").write_text(REPORT.replace('"report", "30', '"other", "*'))
    done = batch("lint", "report", "-n", "0")
    assert done.code == 0
    assert "other" not in done.out and "broken" not in done.out
    refuses(batch("lint", "nope"), "'nope'", "other, report", "tasks/broken.py")


def test_a_task_without_a_schedule_has_no_times(batch: Batch, report: Path) -> None:
    report.write_text(REPORT.replace('"30 2 * * *"', "None"))
    assert batch("lint").out.splitlines()[1:3] == ["  No schedule: it is started by hand", ""]


def test_the_tasks_of_this_repository_are_clean(batch: Batch) -> None:
    done = batch("lint", TASKS_DIR=str(ROOT / "tasks"))
    assert done.code == 0 and ", 0 errors, 0 warnings, 0 notes" in done.out


# new


def test_new_writes_a_task_that_can_be_used(batch: Batch, tmp_path: Path) -> None:
    done = batch("new", "daily-sales.v2", "--schedule", "15 6 * * 1-5")
    assert (done.code, done.err) == (0, "")
    assert "tasks/daily_sales_v2.py" in done.out and "tests/test_daily_sales_v2.py" in done.out
    (row,) = batch("tasks", "--json").json
    assert (row["name"], row["schedule"], row["error"]) == ("daily-sales.v2", "15 6 * * 1-5", None)
    assert batch("run", "daily-sales.v2").code == 0
    assert batch("lint").out.endswith("1 task, 0 errors, 0 warnings, 0 notes\n")


def test_in_an_empty_folder_a_new_task_gets_the_folder_of_tasks_too(
    batch: Batch, tmp_path: Path
) -> None:
    (tmp_path / "tasks").rmdir()
    assert batch("new", "first", "--schedule", "none").code == 0
    assert batch("run", "first").code == 0
    assert "first" in (tmp_path / "tasks/first.py").read_text()


def test_in_an_empty_folder_the_tests_of_a_new_task_pass_without_a_warning(tmp_path: Path) -> None:
    written = command(tmp_path, "new", "first")
    assert "pytest.ini  the settings of pytest" in written.stdout
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    done = preloaded.run(words, tmp_path, environment({}), within=60)
    assert "2 passed" in done.stdout
    assert "warning" not in (done.stdout + done.stderr).lower()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    assert "pytest.ini" not in command(tmp_path, "new", "second").stdout


def test_new_makes_a_package_of_the_folder_once(batch: Batch, tmp_path: Path) -> None:
    init = tmp_path / "tasks/__init__.py"
    batch("new", "one")
    assert init.read_text() == '"""The tasks of this service, one file each."""\n'
    init.write_text("mine = 1\n")
    batch("new", "two")
    assert init.read_text() == "mine = 1\n"


def test_new_writes_a_sync_task_without_a_schedule(batch: Batch, tmp_path: Path) -> None:
    assert (
        batch("new", "by_hand_task", "--sync", "--schedule", "none", "--tests", "checks").code == 0
    )
    text = (tmp_path / "tasks" / "by_hand_task.py").read_text()
    assert (
        "class ByHandTask(BaseTask)" in text
        and "\n    def run(" in text
        and "schedule = None" in text
    )
    assert "fires_on_schedule" not in (tmp_path / "checks" / "test_by_hand_task.py").read_text()


@pytest.mark.parametrize("there", ["tasks/mine.py", "tests/test_mine.py"])
def test_new_overwrites_nothing(batch: Batch, tmp_path: Path, there: str) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("precious\n")
    refuses(batch("new", "mine"), there, "nothing was written")
    assert [str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*.py")] == [there]
    assert (tmp_path / there).read_text() == "precious\n"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["Daily"], ["'Daily'", "a-z 0-9 _ . -"]),
        (["2fa"], ["'2fa'", "begins with a letter"]),
        (["_hidden"], ["'_hidden'", "begins with a letter"]),
        (["class"], ["'class'", "keyword of Python"]),
        (["mine", "--schedule", "0 25 * * *"], ["'0 25 * * *'", "hour"]),
        ([], ["NAME"]),
    ],
)
def test_new_refuses_names_and_options_that_can_not_make_a_task(
    batch: Batch, tmp_path: Path, words: list[str], named: list[str]
) -> None:
    refuses(batch("new", *words), *named)
    assert list(tmp_path.rglob("*.py")) == []


def test_new_needs_the_tasks_folder(batch: Batch, tmp_path: Path) -> None:
    refuses(batch("new", "mine", TASKS_DIR="nowhere"), "TASKS_DIR", "nowhere")
    (tmp_path / "my-tasks").mkdir()
    refuses(batch("new", "mine", TASKS_DIR="my-tasks"), "TASKS_DIR", "'my-tasks'")


def test_new_names_a_folder_that_can_not_be_written(batch: Batch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refuses(batch("new", "mine", "--tests", "file/tests"), "file/tests", "can't be written")


def test_the_clock_of_the_written_test_is_that_of_the_fixture() -> None:
    assert START == kit.START


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of an author, who has pytest's strictest settings, with new tasks of each kind."""
    folder = tmp_path_factory.mktemp("author")
    (folder / "tasks").mkdir()
    (folder / "jobs" / "nightly").mkdir(parents=True)
    strict = 'filterwarnings = ["error"]\nasyncio_default_fixture_loop_scope = "function"'
    (folder / "pyproject.toml").write_text(f"[tool.pytest.ini_options]\n{strict}\n")
    for words in (
        ["daily"],
        ["often", "--schedule", "*/5 * * * *"],
        ["by_hand", "--schedule", "none", "--sync"],
    ):
        assert command(folder, "new", *words).returncode == 0
    done = command(
        folder,
        "new",
        "far",
        "--schedule",
        "0 0 1 * *",
        "--sync",
        settings={"TASKS_DIR": "jobs/nightly"},
    )
    assert done.returncode == 0
    return folder


@pytest.mark.parametrize("mode", ["strict", "auto"])
def test_the_written_tests_pass(written: Path, mode: str) -> None:
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        f"asyncio_mode={mode}",
    ]
    tests = [
        file for file in sorted((written / "tests").iterdir()) if file.name.startswith("test_")
    ]
    assert len(tests) == 4
    near = [*words, *(str(file) for file in tests if "far" not in file.name)]
    for call, settings, count in (
        (near, {}, 5),
        ([*words, "tests/test_far.py"], {"TASKS_DIR": "jobs/nightly"}, 2),
    ):
        done = preloaded.run(call, written, environment(settings), within=120)
        assert done.returncode == 0, done.stdout
        assert f"{count} passed" in done.stdout


def test_a_written_test_fails_when_its_task_does(written: Path) -> None:
    file = written / "tasks" / "daily.py"
    before = file.read_text()
    file.write_text(before.replace("logger.info", "raise RuntimeError"))
    try:
        words = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/test_daily.py",
        ]
        done = preloaded.run(words, written, environment(), within=120)
    finally:
        file.write_text(before)
    assert done.returncode == 1 and "2 failed" in done.stdout and "has work to do" in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["ruff", "check", "--no-cache", "--select", "E,F,W,I,N,UP,B,PT,RUF,ANN,ASYNC"],
        ["ruff", "format", "--no-cache", "--check"],
        pytest.param(
            ["mypy", "--strict", "--cache-dir=/dev/null", "--explicit-package-bases"],
            marks=pytest.mark.types,
        ),
    ],
    ids=" ".join,
)
def test_the_written_files_are_clean(written: Path, words: list[str]) -> None:
    call = [sys.executable, "-m", *words, "tasks", "jobs", "tests"]
    done = subprocess.run(
        call, cwd=written, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout


# Completion, by what a shell calls.


def completed(folder: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """What bash is told when Tab is pressed at the end of `batch words`."""
    asked = {"COMP_WORDS": shlex.join(["batch", *words]), "COMP_CWORD": str(len(words))}
    env = {**environment(settings), **asked, "_BATCH_COMPLETE": "complete_bash"}
    return preloaded.run(BATCH, folder, env, within=30)


def quietly(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize(
    "words", [["run"], ["show"], ["logs"], ["lint"], ["runs", "--task"], ["account", "--task"]]
)
def test_names_of_tasks_are_completed(report: Path, tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "tasks" / "two.py").write_text(
        'class A:\n  name: str = "rest"\nclass B:\n  name = "other"\n'
    )
    (tmp_path / "tasks" / "_base.py").write_text('class A:\n  name = "restless"\n')
    assert quietly(completed(tmp_path, *words, "re")) == ["report", "rest"]


def test_commands_and_states_are_completed(tmp_path: Path) -> None:
    assert quietly(completed(tmp_path, "ru")) == ["run", "runs"]
    assert quietly(completed(tmp_path, "runs", "--state", "s")) == ["succeeded", "skipped"]


@pytest.mark.first_start
def test_completing_runs_no_code_of_an_author(report: Path, tmp_path: Path) -> None:
    report.write_text(f"{REPORT}\nopen('ran', 'w')\n")
    assert quietly(completed(tmp_path, "run", "")) == ["report"]
    assert not (tmp_path / "ran").exists() and not (tmp_path / "ledger.db").exists()


def test_errors_are_not_printed_during_completion(report: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks" / "broken.py").write_text("class A(:\n")
    (tmp_path / "tasks" / "warns.py").write_text("'\\d'\n")
    (tmp_path / "tasks" / "binary.py").write_bytes(b"\0\xff")
    assert quietly(completed(tmp_path, "run", "", PYTHONWARNINGS="always")) == ["report"]
    assert quietly(completed(tmp_path, "run", "", TASKS_DIR="/nowhere")) == []
    assert quietly(completed(tmp_path, "run", "", PORT="not a number")) == []


def test_the_script_for_bash_works_in_bash(report: Path, tmp_path: Path) -> None:
    script = """
        eval "$(batch --show-completion)"
        COMP_WORDS=(batch run re) COMP_CWORD=2
        _batch_completion batch
        echo "${COMPREPLY[@]}"
    """
    env = {**environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=30
    )
    assert (done.stdout, done.stderr) == ("report\n", "")


@pytest.mark.parametrize(
    ("shell", "answer"),
    [("zsh", """_arguments '*: :(("report"))'"""), ("fish", "report"), ("pwsh", "report:::")],
)
def test_other_shells_are_answered_in_their_own_way(
    report: Path, tmp_path: Path, shell: str, answer: str
) -> None:
    """What the scripts of these shells send. The scripts of fish and zsh were tried by hand; no
    PowerShell was available.
    """
    asked = {"_TYPER_COMPLETE_ARGS": "batch run re", "_TYPER_COMPLETE_WORD_TO_COMPLETE": "re"}
    asked |= {"_BATCH_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = preloaded.run(BATCH, tmp_path, {**environment(), **asked}, within=30)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, answer, "")


# The help


def names() -> list[str]:
    from tests.docs.test_docs import commands

    return list(commands())


def leaves() -> dict[str, Any]:
    """Each command that does something; those of a group with its name before theirs."""
    from tests.docs.test_docs import commands, commands_of

    found = {}
    for name, one in commands().items():
        inner = commands_of(one) if hasattr(one, "list_commands") else {}
        found |= {f"{name} {word}": each for word, each in inner.items()} or {name: one}
    return found


def shown(folder: Path, *words: str) -> str:
    env = {**environment(), "COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
    done = preloaded.run(words, folder, env, within=30)
    assert done.returncode == 0, done.stderr
    return done.stdout


EACH_HELP = """
import sys
from batch_system import cli

for name in sys.argv[1:]:
    sys.argv = ["batch", *name.split(), "--help"]
    try:
        cli.main()
    except SystemExit as exited:
        assert exited.code == 0
    print(end="\\f")
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command prints for `--help`, from one process."""
    texts = shown(
        tmp_path_factory.mktemp("helps"), sys.executable, "-c", EACH_HELP, *EXAMPLES
    ).split("\f")
    return dict(zip(EXAMPLES, texts[:-1], strict=True))


def test_every_command_has_examples_and_no_other() -> None:
    assert sorted(EXAMPLES) == sorted(leaves())
    assert all(EXAMPLES.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_help_of_a_command_fits_80_columns_and_shows_its_examples(
    helps: dict[str, str], name: str
) -> None:
    assert all(len(line) <= 80 for line in helps[name].splitlines())
    for line, what in EXAMPLES[name].items():
        assert f"\n    {line}\n        {what}\n" in helps[name]
    first = next(line for line in helps[name].splitlines()[1:] if line.strip())
    assert first.strip()[0].isupper()


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - {"serve", "demo", "work"}))
def test_each_command_has_json_as_a_plain_flag(helps: dict[str, str], name: str) -> None:
    assert re.search(r"^  --json +[A-Z]", helps[name], re.MULTILINE) and "<bool>" not in helps[name]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_has_only_options_that_exist(name: str) -> None:
    known = {option for parameter in leaves()[name].params for option in parameter.opts}
    for line in EXAMPLES[name]:
        words = shlex.split(line.split("|")[0])
        called = ["batch", *name.split()]
        assert words[: len(called)] == called
        assert {word for word in words[len(called) :] if word.startswith("-")} <= known


def test_all_commands_say_what_h_became(batch: Batch, report: Path) -> None:
    report.write_text(REPORT.replace("30 2 *", "H 2 *"))
    became = "H 2 * * *, which became 44 2 * * *"
    shown = [
        batch("next", "report").out.splitlines()[1],
        batch("next", "H 2 * * *", "--task", "report").out.splitlines()[1],
        batch("lint").out.splitlines()[2].strip(),
        re.findall(r"^schedule +(.*)", batch("show", "report").out, re.MULTILINE)[0],
    ]
    assert shown == [became] * 3 + [f"{became}: At 02:44 every day (Europe/Berlin)"]
    (task,) = batch("tasks", "--json").json
    assert (task["given"], task["schedule"]) == ("H 2 * * *", "44 2 * * *")
    (linted,) = batch("lint", "--json").json
    assert linted["given"] == "H 2 * * *"
    refuses(batch("next", "H 2 * * *"), "H", "--task NAME")
    refuses(batch("next", "nobody"), "nobody", "report")


def test_a_new_task_may_have_an_h(batch: Batch, tmp_path: Path) -> None:
    assert batch("new", "load", "--schedule", "H 2 * * *").code == 0
    assert 'schedule = "H 2 * * *"' in (tmp_path / "tasks" / "load.py").read_text()


@pytest.mark.parametrize("name", ["new", "tasks", "next", "lint", "run"])
def test_the_examples_of_commands_about_tasks_work(batch: Batch, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "shop" / "tasks"
    folder.mkdir(parents=True)
    for task in ("backup", "daily_report"):
        (folder / f"{task}.py").write_text((ROOT / "tasks" / f"{task}.py").read_text())
    for line in EXAMPLES[name]:
        # No service is here that would take it.
        words = [word for word in shlex.split(line)[1:] if word != "--wait"]
        if name == "new":
            os.chdir(_emptied(tmp_path))
            done = batch(*words)
        else:
            done = batch(*words, TASKS_DIR=str(folder))
        assert done.code == 0, f"{line}: {done.err}"


def _emptied(folder: Path) -> Path:
    made = folder / str(len(list(folder.iterdir())))
    (made / "tasks").mkdir(parents=True)
    return made


def test_the_list_of_commands_is_in_groups_with_a_sentence_each(tmp_path: Path) -> None:
    text = shown(tmp_path, *BATCH, "--help")
    places = [
        text.index(f"\n{panel}:\n") for panel in ("Service", "Tasks", "Runs", "Backups", "Access")
    ]
    assert places == sorted(places)
    listed = re.findall(r"^  (\w+)  +([A-Z].*)$", text, re.MULTILINE)
    assert [name for name, _ in listed] == names()
