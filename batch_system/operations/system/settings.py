"""`operations.settings()`: the settings as they are used, without secrets, and where each one came
from.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import SecretStr

from batch_system.operations.system.results import UsedSetting, UsedSettings
from batch_system.redaction import MASK
from batch_system.settings.alerts import NAMED
from batch_system.settings.settings import SECRET, Settings

PLACE = re.compile(r"(?P<scheme>[\w+.-]+://)(?P<login>[^/?#]*@)?(?P<rest>[^?#]*)")


def used(settings: Settings) -> UsedSettings:
    """The settings of the service, in the order of their declaration."""
    sources = settings.sources
    listed = [
        UsedSetting(
            name=name,
            value=_shown(name, getattr(settings, name)),
            source=sources.get(name, "default"),
        )
        for name in Settings.model_fields
    ]
    given = {*(settings.model_extra or {}), *(sources.keys() - Settings.model_fields.keys())}
    others = sorted(name for name in given if not name.startswith(NAMED))
    return UsedSettings(settings=listed, others=others)


def _shown(name: str, value: Any) -> str | int | float | bool | None:
    """The value for people. For a secret setting, only whether it is set."""
    if value is None or value == "":
        return None
    is_secret = isinstance(value, SecretStr) or name.endswith(SECRET)
    if is_secret and not name.endswith("_URL"):
        return MASK
    if is_secret:
        return _without_secrets(str(value))
    number: bool | int | float | None = value if isinstance(value, bool | int | float) else None
    return str(value) if number is None else number


def _without_secrets(url: str) -> str:
    """A URL without its password and its query; `***` if it is not a URL."""
    if (place := PLACE.match(url)) is None:
        return MASK
    login = place["login"] or ""
    name, has_password, _ = login.removesuffix("@").partition(":")
    shown = f"{name}:{MASK}@" if has_password else login
    return f"{place['scheme']}{shown}{place['rest']}"
