"""`batch demo`: the pages with made-up databases."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import BATCH, batch, service

SINCE = "2026-10-24T18:00:00+00:00"
FAILING = {"bank_statements": 37, "nightly_statements": 1, "invoice_pdf": 2}
"""The failed runs of the demonstration that need a person."""


def numbers(url: str, folder: Path) -> dict[str, list[int]]:
    """What each door says of the night: a list of numbers that should be equal, by what they
    count.
    """
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:

        def page(path: str, **query: str) -> str:
            shown = client.get(path, params=query)
            assert shown.status_code == 200, path
            return re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", unescape(shown.text)))

        def api(path: str, **query: str) -> dict[str, Any]:
            return dict(client.get(f"/api/v1/{path}", params=query).json())

        def command(*words: str) -> dict[str, Any]:
            return dict(json.loads(batch(folder, "--url", url, *words, "--json").stdout))

        gauges = client.get("/metrics").text

        def gauge(name: str) -> int:
            found = re.search(rf"^{re.escape(name)} ([0-9.]+)$", gauges, re.MULTILINE)
            assert found is not None, name
            return int(float(found[1]))

        night, status, said = api("night"), api("status"), command("night")
        slots = {"origin": "planned", "slot_since": SINCE}
        home, tasks, runs = page("/"), page("/tasks"), page("/runs")
        return {
            "failed runs that are open": [
                sum(FAILING.values()),
                status["failed"],
                command("status")["failed"],
                *(sum(need["open"] for need in each["needs"]) for each in (night, said)),
                sum(each["open"] for each in api("incidents", kind="failed")["incidents"]),
            ],
            "those of a task": [
                FAILING["bank_statements"],
                gauge('batch_failure_streak{task="bank_statements"}'),
                number(home, r"bank_statements (\d+) runs failed"),
                number(tasks, r"(\d+) failed in a row"),
                number(page("/incidents"), r"bank_statements (\d+) runs"),
                number(page("/tasks/bank_statements"), r"(\d+)(?: runs failed| of its last)"),
                number(page("/runs", state="failed", task="bank_statements"), r"×(\d+)"),
            ],
            "tasks that need a person": [
                len(FAILING),
                len(night["needs"]),
                len(status["troubles"]),
                gauge('batch_incidents_open{kind="failed"}'),
                number(home, r"Incidents (\d+)"),
                number(tasks, r"Attention (\d+)"),
            ],
            "failed slots": [
                night["slots"]["failed"],
                said["slots"]["failed"],
                number(status["sentence"], r"(\d+) failed"),
                number(home, r"(\d+) failed , "),
                len(api("runs", **slots_of_api(), state="failed", limit="200")["runs"]),
                number(page("/runs", **slots, state="failed"), r"(\d+) runs in \d+ lines"),
            ],
            "running runs": [
                status["running"],
                gauge('batch_runs{state="running"}'),
                number(tasks, r"Running now (\d+)"),
                number(runs, r"Running (\d+)"),
                len(api("runs", state="running")["runs"]),
            ],
            "unaccounted slots": [
                night["slots"]["unaccounted"],
                said["slots"]["unaccounted"],
                gauge("batch_unaccounted_slots"),
                number(home, r"(\d+) unaccounted"),
            ],
        }


def slots_of_api() -> dict[str, str]:
    """The filter of the API for the slots of the night."""
    return {"origin": "schedule", "slot_since": SINCE}


def number(text: str, pattern: str) -> int:
    """The number that stands in a text."""
    found = re.search(pattern, text)
    assert found is not None, (pattern, text[:4_000])
    return int(found[1].replace(",", ""))


@pytest.mark.rest
def test_the_demonstration_opens_on_a_night_of_which_all_doors_say_the_same(
    tmp_path: Path,
) -> None:
    elsewhere = {
        "TMPDIR": str(tmp_path),
        "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing",
        "BATCH_ALERT_URL_PAYMENTS": "json://127.0.0.1:1",
    }
    with service(tmp_path, (*BATCH, "demo", "--port", "0"), elsewhere) as running:
        night = httpx.get(running.url, trust_env=False)
        assert night.status_code == 200
        assert "bank_statements, nightly_statements and invoice_pdf need a person" in night.text
        assert "0 unaccounted" in night.text and "Last 14 nights" in night.text
        for what, said in numbers(running.url, tmp_path).items():
            assert len(set(said)) == 1, (what, said)
        running.stop()
    assert not list(tmp_path.glob("batch-demo-*"))


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "app.db").write_text("mine")
    done = batch(tmp_path, "demo", "--folder", "mine")
    assert done.returncode == 2 and "has other files; allowed: a missing or empty" in done.stderr
    assert (tmp_path / "mine" / "app.db").read_text() == "mine"
