from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from batch_system import Settings, get_settings
from batch_system.config import forget_settings, refresh_settings
from batch_system.errors import InvalidSetting
from batch_system.settings.project_file import PROJECT_FILE
from batch_system.settings.urls import async_url

ENV = Path(".env")


def write(text: str) -> None:
    """Write `.env` with a new modification time each time, also on a file system with coarse
    times.
    """
    before = ENV.stat().st_mtime if ENV.exists() else 1_000_000_000
    ENV.write_text(text)
    os.utime(ENV, (before + 1, before + 1))


def refusal() -> str:
    with pytest.raises(InvalidSetting) as caught:
        get_settings()
    return caught.value.message


def test_without_env_the_defaults_hold() -> None:
    settings = get_settings()
    assert (
        settings.PORT == 8000
        and settings.LOG_FORMAT == "console"
        and str(settings.TASKS_DIR) == "tasks"
    )
    assert get_settings() is settings


def test_env_file_and_environment_are_read_and_the_environment_wins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write('PORT=9000\nBACKUP_CRON="0 3 * * *"  # at night\nHOST=\n')
    monkeypatch.setenv("PORT", "9001")
    settings = get_settings()
    assert (settings.PORT, settings.BACKUP_CRON, settings.HOST) == (9001, "0 3 * * *", "127.0.0.1")


def test_pyproject_toml_may_name_parts_of_the_project_and_env_precedes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("BATCH_MIGRATIONS")
    Path("mine/versions").mkdir(parents=True)
    PROJECT_FILE.write_text(
        '[tool.batch-system]\nTASKS_DIR = "shop/jobs"\nBATCH_MIGRATIONS = "mine"\n'
    )
    write("TASKS_DIR=shop/tasks\n")
    settings = get_settings()
    assert (Path("shop/tasks"), Path("mine")) == (settings.TASKS_DIR, settings.BATCH_MIGRATIONS)
    assert settings.sources == {"TASKS_DIR": ".env", "BATCH_MIGRATIONS": "pyproject.toml"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            '[tool.batch-system]\nDATABASE_URL = "postgresql://user:secret@host/name"',
            "'DATABASE_URL' is not read from [tool.batch-system] in pyproject.toml, which is "
            "committed; set it in .env. Allowed there: TASKS_DIR, SETTINGS, BATCH_MIGRATIONS",
        ),
        ("[tool.batch-system\n", "the file pyproject.toml can't be read: Expected ']'"),
        ("[tool]\nbatch-system = 3\n", "[tool.batch-system] in pyproject.toml is 3; allowed: a "),
        (
            '[tool.batch-system]\nBATCH_MIGRATIONS = "nowhere"',
            "setting BATCH_MIGRATIONS: allowed: a folder that has a folder `versions` with ",
        ),
    ],
)
def test_a_wrong_pyproject_toml_is_refused_without_a_secret(
    text: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BATCH_MIGRATIONS")
    PROJECT_FILE.write_text(text)
    assert refusal().startswith(sentence) and "secret" not in refusal()


def test_an_authors_own_keys_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    write('CUSTOM_TASK_CRON="0 7 * * *"\nBOTH=file\n')
    monkeypatch.setenv("BOTH", "environment")
    monkeypatch.setenv("API_TOKEN2", "t")
    settings = get_settings()
    assert (settings.CUSTOM_TASK_CRON, settings.BOTH, settings.API_TOKEN2) == (
        "0 7 * * *",
        "environment",
        "t",
    )


def test_a_missing_key_is_named_with_the_places_where_it_could_be() -> None:
    with pytest.raises(
        AttributeError, match=r"no setting CUSTOM_CRON: neither the environment nor \.env has it"
    ):
        _ = get_settings().CUSTOM_CRON
    assert getattr(get_settings(), "CUSTOM_CRON", "default") == "default"
    assert not hasattr(get_settings(), "lower_case")


def test_env_is_read_again_when_it_changed() -> None:
    write("CRON=one\n")
    first = get_settings()
    assert refresh_settings() is first
    write("CRON=two\n")
    assert get_settings() is first
    assert refresh_settings().CRON == get_settings().CRON == "two"
    ENV.unlink()
    assert not hasattr(refresh_settings(), "CRON")


def test_an_invalid_new_value_keeps_the_old_settings_and_is_reported_once() -> None:
    write("PORT=9000\n")
    get_settings()
    write("PORT=many\n")
    with pytest.raises(InvalidSetting, match="setting PORT"):
        refresh_settings()
    assert refresh_settings().PORT == get_settings().PORT == 9000
    write("PORT=9002\n")
    assert refresh_settings().PORT == 9002


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("PORT", "abc", "valid integer"),
        ("PORT", "65536", "less than or equal to 65535"),
        ("LOG_LEVEL", "loud", "'DEBUG', 'INFO', 'WARNING', 'ERROR' or 'CRITICAL'"),
        ("LOG_FORMAT", "xml", "'console' or 'json'"),
        ("MAX_RUNNING", "0", "greater than or equal to 1"),
        ("MAX_THREADS", "-1", "greater than or equal to 1"),
        ("DRAIN_SECONDS", "inf", "less than or equal to 86400"),
        ("LEASE_SECONDS", "nan", "less than or equal to 86400"),
        ("BACKUP_RETENTION_DAYS", "1000000000", "less than or equal to 36500"),
    ],
)
def test_an_invalid_value_is_named_with_the_allowed_ones(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str
) -> None:
    monkeypatch.setenv(name, value)
    message = refusal()
    assert (
        message.startswith(f"setting {name}: ")
        and allowed in message
        and f"(it is '{value}')" in message
    )
    assert refusal() == message


def test_all_wrong_settings_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "x")
    monkeypatch.setenv("MAX_RUNNING", "y")
    assert "setting PORT" in refusal() and "setting MAX_RUNNING" in refusal()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"BATCH_DATABASE_POOLER": "session"}, "setting BATCH_DATABASE_POOLER: .*'transaction'"),
        (
            {"LEDGER_URL": "postgresql://u:sekret@h/d?options=-csearch_path%3Dshop"},
            "LEDGER_URL has `options`, .*: leave them out, and set them for the role",
        ),
    ],
)
def test_a_pooler_of_another_mode_and_options_that_it_drops_are_refused(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], sentence: str
) -> None:
    for name, value in {"BATCH_DATABASE_POOLER": "transaction", **settings}.items():
        monkeypatch.setenv(name, value)
    assert re.search(sentence, refusal()) and "sekret" not in refusal()


def test_a_pooler_concerns_no_database_of_sqlite() -> None:
    """Such as that of an author's test, beside the `.env` of the service."""
    write("BATCH_DATABASE_POOLER=transaction\n")
    settings = get_settings()
    assert settings.backup_database == ("DATABASE_URL", settings.DATABASE_URL)


@pytest.mark.parametrize(
    "url",
    [
        "sekret",
        "postgresql://u:sekret@h:port/d",
        "postgresql://u:x@sekret:1@h/d",
        "postgresql://u:sekret@[::1/d",
        "foo://u:sekret@h/d",
        "postgresql+psycopg2://u:sekret@h/d",
        "sqlite+pysqlite:///sekret.db",
    ],
)
@pytest.mark.parametrize("name", ["DATABASE_URL", "LEDGER_URL", "BACKUP_DATABASE_URL"])
def test_a_wrong_database_url_is_named_without_its_password(
    monkeypatch: pytest.MonkeyPatch, name: str, url: str
) -> None:
    monkeypatch.setenv(name, url)
    message = refusal()
    assert message.startswith(f"setting {name}: ") and "sekret" not in message
    assert "sqlite://" in message


@pytest.mark.parametrize(
    "url", ["sekret", "gs://sekret/x", "s3://", "s3://key:sekret@bucket", "file://"]
)
def test_a_wrong_place_for_backups_is_named_without_a_possible_key(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("BACKUP_URL", url)
    assert refusal().startswith("setting BACKUP_URL: ") and "sekret" not in refusal()
    assert "s3://bucket/prefix" in refusal()


def test_the_ledger_is_on_sqlite_or_postgresql_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "mysql+aiomysql://u:sekret@h/d")
    assert get_settings().ledger_url == "sqlite+aiosqlite:///./ledger.db"
    forget_settings()
    monkeypatch.setenv("LEDGER_URL", "mysql+aiomysql://u:sekret@h/d")
    assert refusal().startswith(
        "setting LEDGER_URL: the ledger can't be in such a database; allowed: postgresql:// or "
        "sqlite://"
    )
    assert "sekret" not in refusal()


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("postgres://u:p%40@h/d", "postgresql+asyncpg://u:p%40@h/d"),
        ("postgresql://h/d?ssl=require", "postgresql+asyncpg://h/d?ssl=require"),
        ("sqlite:///./app.db", "sqlite+aiosqlite:///./app.db"),
        ("sqlite+aiosqlite:////var/app.db", "sqlite+aiosqlite:////var/app.db"),
    ],
)
def test_a_bare_url_gets_an_async_driver(given: str, made: str) -> None:
    assert async_url(given) == made


@pytest.mark.parametrize(
    ("application", "ledger"),
    [
        ("sqlite:///./app.db", "sqlite+aiosqlite:///./ledger.db"),
        ("sqlite:///data/app.db", "sqlite+aiosqlite:///data/ledger.db"),
        ("sqlite:////var/app.db", "sqlite+aiosqlite:////var/ledger.db"),
        ("postgresql://u:p@h/d", "postgresql+asyncpg://u:p@h/d"),
    ],
)
def test_the_ledger_stands_beside_sqlite_and_in_postgresql(
    monkeypatch: pytest.MonkeyPatch, application: str, ledger: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", application)
    assert get_settings().ledger_url == ledger
    assert get_settings().ledger_setting == "DATABASE_URL"
    forget_settings()
    monkeypatch.setenv("LEDGER_URL", ledger)
    assert (get_settings().ledger_url, get_settings().ledger_setting) == (ledger, "LEDGER_URL")


@pytest.mark.parametrize("content", [b"HOST=\xff\xfe\n", b"\xff\xfeH\x00"])
def test_an_env_file_that_is_not_text_is_named(content: bytes) -> None:
    ENV.write_bytes(content)
    assert refusal().startswith("the file .env can't be read: ")


def test_an_env_file_from_windows_is_read() -> None:
    ENV.write_bytes("\ufeffHOST=0.0.0.0\r\nCRON=one\r\n".encode())
    assert (get_settings().HOST, get_settings().CRON) == ("0.0.0.0", "one")


def test_every_setting_has_a_description() -> None:
    fields: dict[str, Any] = dict(Settings.model_fields)
    assert fields and all(field.description for field in fields.values())


def test_a_lease_shorter_than_three_heartbeats_is_refused_without_showing_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://bob:hunter2@db/shop")
    monkeypatch.setenv("LEASE_SECONDS", "14")
    with pytest.raises(
        InvalidSetting, match=r"LEASE_SECONDS \(14\).*three times HEARTBEAT_SECONDS \(5\)"
    ) as caught:
        get_settings()
    assert "hunter2" not in str(caught.value)


def test_a_limit_below_two_seconds_for_a_blocked_loop_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MAX_LOOP_BLOCK", "0.5")
    with pytest.raises(
        InvalidSetting, match=r"MAX_LOOP_BLOCK \(0\.5\) must be 0 \(never\) or at least 2"
    ):
        get_settings()
    for allowed in ("0", "2"):
        monkeypatch.setenv("MAX_LOOP_BLOCK", allowed)
        forget_settings()
        assert float(allowed) == get_settings().MAX_LOOP_BLOCK


def test_another_role_for_backups_needs_postgresql(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKUP_DATABASE_URL", "postgresql://bob:hunter2@db/shop")
    with pytest.raises(
        InvalidSetting, match=r"BACKUP_DATABASE_URL names another role .* both have to be"
    ) as caught:
        get_settings()
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("DATABASE_URL", "postgresql://shop@db/shop")
    forget_settings()
    assert get_settings().backup_database == (
        "BACKUP_DATABASE_URL",
        "postgresql+asyncpg://bob:hunter2@db/shop",
    )
    assert "hunter2" not in repr(get_settings())


def test_libpqs_name_for_encryption_becomes_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://bob@db/shop?sslmode=require")
    assert get_settings().DATABASE_URL == "postgresql+asyncpg://bob@db/shop?ssl=require"


OWN = """
from pydantic_settings import BaseSettings, SettingsConfigDict
from batch_system import Settings

class Extended(Settings):
    REPORT_TO: str = "nobody"
    LIMIT: int = 5

class Plain(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="MAIL_")
    port: int = 25
    password: int = 0

not_a_class = 5
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a module with settings in the working directory, and return its name, which is new each
    time.
    """
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"own_{len(sys.modules)}"
    (tmp_path / f"{name}.py").write_text(OWN)
    yield name
    sys.modules.pop(name, None)


def test_settings_may_be_a_class_of_the_author_s_that_extends_ours(own: str) -> None:
    write(f"SETTINGS={own}:Extended\nPORT=9000\nLIMIT=7\n")
    settings = get_settings()
    extended = sys.modules[own].Extended
    assert isinstance(settings, extended) and get_settings(extended) is settings
    assert (settings.PORT, settings.LIMIT) == (9000, 7)
    write(f"SETTINGS={own}:Extended\nLIMIT=8\n")
    refresh_settings()
    assert get_settings(extended).LIMIT == 8


def test_settings_may_be_any_base_settings_beside_ours(own: str) -> None:
    write(f"SETTINGS={own}:Plain\nPORT=9000\nMAIL_PORT=26\n")
    assert get_settings().PORT == 9000
    plain = sys.modules[own].Plain
    assert get_settings(plain).port == 26


def test_a_class_that_settings_does_not_name_is_refused(own: str) -> None:
    class Other(Settings):
        pass

    assert get_settings(Settings) is get_settings()
    with pytest.raises(
        InvalidSetting, match=r"setting SETTINGS is None; for get_settings\(Other\) it has to be"
    ):
        get_settings(Other)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (
            "nowhere:Own",
            "setting SETTINGS: nowhere:Own can't be imported: ModuleNotFoundError: No module "
            "named 'nowhere'",
        ),
        (
            "{own}:Missing",
            "setting SETTINGS: {own}:Missing can't be imported: AttributeError: module",
        ),
        (
            "{own}:not_a_class",
            "{own}:not_a_class is 5; allowed: a subclass of pydantic's BaseSettings",
        ),
        ("{own}", "setting SETTINGS: String should match pattern"),
    ],
)
def test_an_unusable_name_of_a_settings_class_is_reported(
    own: str, named: str, message: str
) -> None:
    write(f"SETTINGS={named.format(own=own)}\n")
    assert message.format(own=own) in refusal()


def test_the_value_of_an_author_s_own_setting_is_never_shown(own: str) -> None:
    write(f"SETTINGS={own}:Plain\nMAIL_PASSWORD=hunter2\nMAIL_PORT=26\n")
    assert "password" in refusal().lower() and "hunter2" not in refusal()
    write(f"SETTINGS={own}:Extended\nLIMIT=hunter2\n")
    assert "setting LIMIT" in refusal() and "hunter2" not in refusal()


def test_the_repr_of_settings_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        "DATABASE_URL=postgresql://me:hunter2@localhost/x\n"
        "SENTRY_DSN=https://hunter2@localhost/1\n"
        "OWN_KEY=hunter2\n"
    )
    shown = f"{get_settings()!r} {get_settings()}"
    assert "hunter2" not in shown and "PORT=8000" in shown and "DATABASE_URL='***'" in shown


def test_an_unescaped_at_in_a_password_is_reported_without_the_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://me:hun@ter2@localhost/x")
    assert (
        refusal()
        == "setting DATABASE_URL: an @ in the password is read as the end of the password: "
        "write it as %40"
    )


def test_an_error_in_a_settings_module_at_import_shows_no_value(tmp_path: Path, own: str) -> None:
    (tmp_path / f"{own}.py").write_text(
        f"{OWN}\nplain = Plain(_env_file='.env')\n".replace('"MAIL_"', '"MAIL_", extra="ignore"')
    )
    write(f"SETTINGS={own}:Plain\nMAIL_PASSWORD=hunter2\n")
    assert "password" in refusal().lower() and "hunter2" not in refusal() and "\n" not in refusal()
