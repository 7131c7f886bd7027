"""`batch demo`: the pages with made-up databases."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.processes import BATCH, batch, service


@pytest.mark.rest
def test_the_demonstration_opens_on_its_night_and_leaves_nothing(tmp_path: Path) -> None:
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
        running.stop()
    assert not list(tmp_path.glob("batch-demo-*"))


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "app.db").write_text("mine")
    done = batch(tmp_path, "demo", "--folder", "mine")
    assert done.returncode == 2 and "has other files; allowed: a missing or empty" in done.stderr
    assert (tmp_path / "mine" / "app.db").read_text() == "mine"
