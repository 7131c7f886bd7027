"""Reads the settings that `pyproject.toml` may contain, in the table [tool.batch-system]."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from batch_system.errors import InvalidSetting
from batch_system.escaping import echoed

PROJECT_FILE = Path("pyproject.toml")
ALLOWED = ("TASKS_DIR", "SETTINGS", "BATCH_MIGRATIONS")
"""The settings that name parts of the project. All others differ between machines, and some are
secret, so they are not in a file that is committed.
"""
_TABLE = f"[tool.batch-system] in {PROJECT_FILE}"


def project_settings() -> dict[str, Any]:
    """The settings in `pyproject.toml` of the working directory; none if there is no such file.

    Raises InvalidSetting if the file can't be read, or if the table has another key.
    """
    try:
        table = (
            tomllib.loads(PROJECT_FILE.read_text("utf-8")).get("tool", {}).get("batch-system", {})
        )
    except FileNotFoundError:
        return {}
    except (AttributeError, OSError, ValueError) as error:
        raise InvalidSetting(f"the file {PROJECT_FILE} can't be read: {error}") from None
    if not isinstance(table, dict):
        raise InvalidSetting(f"{_TABLE} is {echoed(table)}; allowed: a table")
    for key in table:
        if key not in ALLOWED:
            raise InvalidSetting(
                f"{echoed(key)} is not read from {_TABLE}, which is committed; set it in .env. "
                f"Allowed there: {', '.join(ALLOWED)}"
            )
    return table
