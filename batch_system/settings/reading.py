"""Reads the settings once for the process, from the environment and `.env`.

`get_settings()` returns these settings. Only `refresh_settings()` reads again: if `.env` has
changed, and always after `forget_settings()`, which tests call.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast, overload

from pydantic import ValidationError
from pydantic_settings import BaseSettings

from batch_system import failures
from batch_system.errors import InvalidSetting
from batch_system.escaping import LONGEST_QUOTE, cut, echoed
from batch_system.settings.settings import ENV_FILE, SECRET
from batch_system.settings.settings import Settings as Settings

S = TypeVar("S", bound=BaseSettings)

_settings: Settings | None = None
_own: BaseSettings | None = None
_read_at_mtime = 0.0


def _mtime() -> float:
    try:
        return ENV_FILE.stat().st_mtime
    except OSError:
        return 0.0


@overload
def get_settings() -> Settings: ...
@overload
def get_settings(cls: type[S]) -> S: ...
def get_settings(cls: type[BaseSettings] = Settings) -> BaseSettings:
    """The settings as last read, or those of your own class `cls`, which SETTINGS has to name.

    A service reads `.env` again within seconds of a change. Raises InvalidSetting, which names the
    setting and what is allowed.
    """
    settings = _settings if _settings is not None else refresh_settings()
    for candidate in (settings, _own):
        if isinstance(candidate, cls):
            return candidate
    raise InvalidSetting(
        f"setting SETTINGS is {echoed(settings.SETTINGS)}; for get_settings({cls.__name__}) it has "
        f"to be {cls.__module__}:{cls.__qualname__}"
    )


def refresh_settings() -> Settings:
    """Read `.env` again if it has changed. An invalid value raises InvalidSetting once, and the old
    settings are kept.
    """
    global _settings, _own, _read_at_mtime
    mtime = _mtime()
    if _settings is None or mtime != _read_at_mtime:
        _read_at_mtime = mtime
        _settings, _own = _read()
    return _settings


def forget_settings() -> None:
    """For tests: the next get_settings() reads all settings again."""
    global _settings
    _settings = None


def _read() -> tuple[Settings, BaseSettings]:
    """The service's settings and the author's, which may be the same object."""
    settings = _load(Settings)
    if settings.SETTINGS is None:
        return settings, settings
    own = _load(_own_class(settings.SETTINGS))
    return (own if isinstance(own, Settings) else settings), own


def _load(cls: type[S]) -> S:
    try:
        return cls()
    except ValidationError as error:
        raise InvalidSetting("; ".join(_sentence(e) for e in error.errors())) from None
    except (OSError, UnicodeError) as error:
        raise InvalidSetting(f"the file {ENV_FILE} can't be read: {error}") from None


def _own_class(named: str) -> type[BaseSettings]:
    """The class that SETTINGS names. If it does not extend Settings, it also reads `.env`, and
    ignores our keys in it.
    """
    module, _, name = named.partition(":")
    setting = f"setting SETTINGS: {cut(named, LONGEST_QUOTE)}"
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        cls = getattr(import_module(module), name)
    except ValidationError as error:  # the import of the module reads settings
        raise InvalidSetting("; ".join(_sentence(e) for e in error.errors())) from None
    except Exception as error:  # an author's module may raise anything
        raise InvalidSetting(f"{setting} can't be imported: {failures.line_of(error)}") from error
    if not (isinstance(cls, type) and issubclass(cls, BaseSettings)):
        raise InvalidSetting(
            f"{setting} is {echoed(cls)}; allowed: a subclass of pydantic's BaseSettings"
        )
    if issubclass(cls, Settings):
        return cls
    config = {"env_file": cls.model_config.get("env_file") or ENV_FILE, "extra": "ignore"}
    return cast(
        type[BaseSettings],
        type(name, (cls,), {"model_config": config, "__module__": cls.__module__}),
    )


def _sentence(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if not name:  # the error is about several settings, and some of their values may be secret
        return f"settings: {message}"
    is_open = name in Settings.model_fields and not name.endswith(SECRET)
    value = f" (it is {echoed(error['input'])})" if is_open else ""
    return f"setting {name}: {message}{value}"
