"""All settings of the service, with their defaults and their bounds."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from sqlalchemy.engine import make_url

from batch_system.errors import WITHOUT_POOLER, BackupError
from batch_system.settings.access import AccessSettings
from batch_system.settings.alerts import AlertSettings, alert_urls
from batch_system.settings.pools import Pool, pools_of
from batch_system.settings.project_file import PROJECT_FILE, project_settings
from batch_system.settings.urls import (
    DatabaseUrl,
    LedgerUrl,
    PlaceUrl,
    refuse_one_place,
    refuse_session_options,
    with_login_of,
)

ENV_FILE = Path(".env")
DAY = 86_400.0
SHORTEST_BLOCK = 2.0
SECRET = ("_URL", "_URLS", "_DSN", "_TOKEN", "_SECRET", "_WEBHOOK")
"""Endings of settings whose values may contain a password. The values of an author's own settings
are never shown.
"""


class Settings(AccessSettings, AlertSettings):
    """All settings with their defaults. Values come from the environment, then from `.env`, then
    from `pyproject.toml`, both in the working directory.
    """

    model_config = SettingsConfigDict(
        env_file=ENV_FILE,
        env_file_encoding="utf-8-sig",
        case_sensitive=True,
        extra="allow",
        env_ignore_empty=True,
    )

    _environment: dict[str, str] = PrivateAttr(default_factory=lambda: dict(os.environ))
    """The whole environment at the time when these settings were read, because it contains names of
    pools, of channels and of an author's own settings that are not known in advance.
    """

    HOST: str = Field("127.0.0.1", description="Address that `batch serve` listens on.")
    PORT: int = Field(8000, ge=0, le=65535, description="Port that `batch serve` listens on.")
    TASKS_DIR: Path = Field(
        Path("tasks"), description="Folder or package whose *.py files contain the tasks."
    )
    CALENDARS_DIR: Path = Field(
        Path("calendars"), description="Folder of the files of named calendars, such as bank.toml."
    )
    BATCH_SPREAD: str = Field(
        "",
        max_length=100,
        description="Text by which `H` in schedules differs between two deployments.",
    )

    DATABASE_URL: DatabaseUrl = Field(
        "sqlite+aiosqlite:///./app.db",
        description="The application's database, which get_db() opens.",
    )
    LEDGER_URL: LedgerUrl | None = Field(
        None,
        description="The ledger's database. "
        "Empty: ledger.db beside an SQLite file, or the PostgreSQL database.",
    )
    DATABASE_POOL_SIZE: int = Field(
        20, ge=1, description="PostgreSQL connections for the application per process."
    )
    BATCH_DATABASE_POOLER: Literal["transaction"] | None = Field(
        None,
        description="Mode of the pooler before PostgreSQL, such as PgBouncer. Empty: none, or one "
        "in session mode.",
    )

    BATCH_MIGRATIONS: Path | None = Field(
        None,
        description="Folder of Alembic migrations of your application, which a service executes. "
        "Empty: none.",
    )

    LOG_LEVEL: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field(
        "INFO", description="Lines below this level are dropped."
    )
    LOG_FORMAT: Literal["console", "json"] = Field(
        "console", description="Format of the log lines on stderr."
    )
    BATCH_SHOW_SQL_PARAMETERS: bool = Field(
        False, description="Whether database errors show the values of statements."
    )

    SENTRY_DSN: str | None = Field(
        None, description="DSN of the Sentry project that errors are sent to. Empty: none."
    )

    MAX_RUNNING: int = Field(
        100, ge=1, description="Largest number of concurrent runs in one process."
    )
    MAX_THREADS: int = Field(
        32, ge=1, description="Largest number of threads for sync runs in one process."
    )
    DRAIN_SECONDS: float = Field(
        25.0, ge=0, le=DAY, description="Seconds that runs may continue after a stop signal."
    )
    MAX_LOOP_BLOCK: float = Field(
        300.0,
        ge=0,
        le=DAY,
        description="Seconds after which a process with a blocked event loop ends. 0: never.",
    )
    POLL_SECONDS: float = Field(
        1.0,
        ge=0.05,
        le=60,
        description="Seconds between two polls of the queue, if no notification comes.",
    )
    HEARTBEAT_SECONDS: float = Field(
        5.0, ge=0.1, le=DAY, description="Seconds between two heartbeats of a node."
    )
    LEASE_SECONDS: float = Field(
        30.0, ge=1, le=DAY, description="Seconds that a silent node keeps its runs."
    )

    BATCH_KEEP_EVENTS_DAYS: int = Field(
        400, ge=1, le=36_500, description="Days after which an audit event is deleted."
    )
    BATCH_VERSION: str | None = Field(
        None, max_length=100, description="Version of your application. Empty: of git."
    )
    BATCH_URL: str | None = Field(
        None, description="URL of a service that `batch` commands ask. Empty: the ledger."
    )
    BATCH_TOKEN: SecretStr | None = Field(
        None, description="Token with which `batch` commands ask that service."
    )

    KEEP_RUNS_DAYS: int = Field(
        90, ge=1, le=36_500, description="Days after which a run that has ended is pruned."
    )
    KEEP_RUNS_PER_TASK: int = Field(
        100, ge=1, le=100_000, description="This many runs of each task are always kept."
    )

    BACKUP_CRON: str = Field("0 2 * * *", description="When BackupTask runs (UTC).")
    BACKUP_KEEP_LAST: int = Field(
        7, ge=1, le=100_000, description="This many of the newest backups are always kept."
    )
    BACKUP_RETENTION_DAYS: int = Field(
        7, ge=1, le=36_500, description="Backups older than this many days are deleted."
    )
    BACKUP_KEEP_WEEKLY: int = Field(
        0, ge=0, le=5_200, description="Weeks of which the newest backup is kept."
    )
    BACKUP_KEEP_MONTHLY: int = Field(
        0, ge=0, le=1_200, description="Months of which the newest backup is kept."
    )
    BACKUP_LEAST_SHARE: float = Field(
        0.5,
        ge=0,
        le=1,
        description="No backup is deleted after one with less than this share "
        "of the last one's rows.",
    )
    BACKUP_DIR: Path = Field(Path("backups"), description="Folder that BackupTask writes to.")
    BACKUP_URL: PlaceUrl | None = Field(
        None, description="Place that backups are copied to. Empty: no copies."
    )
    BACKUP_DATABASE_URL: DatabaseUrl | None = Field(
        None,
        description="The same PostgreSQL database by the role that backs up and restores. Empty: "
        "DATABASE_URL.",
    )
    BACKUP_INCLUDE: str = Field(
        "", description="Tables to back up, as patterns. Empty: all of the application's."
    )
    BACKUP_EXCLUDE: str = Field("", description="Tables to leave out, as patterns.")
    BACKUP_LEDGER: bool = Field(False, description="Whether to back up the ledger's tables too.")

    RESTORE_DRILL_CRON: str | None = Field(
        None, description="When RestoreDrillTask runs (UTC). Empty: never."
    )
    RESTORE_DRILL_URL: DatabaseUrl | None = Field(
        None,
        description="Database that RestoreDrillTask restores into. Empty: a new one beside the "
        "application's.",
    )

    SETTINGS: str | None = Field(
        None,
        pattern=r"^[\w.]+:\w+$",
        description="Your own settings: a BaseSettings subclass, as `module:Class`.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The sources of values; an earlier one precedes a later one."""
        sources = (init_settings, env_settings, dotenv_settings, file_secret_settings)
        return (*sources, InitSettingsSource(settings_cls, project_settings()))

    @field_validator("BATCH_MIGRATIONS")
    @classmethod
    def _check_migrations(cls, folder: Path | None) -> Path | None:
        if folder is not None and not (folder / "versions").is_dir():
            raise ValueError("allowed: a folder that has a folder `versions` with migrations")
        return folder

    @model_validator(mode="after")
    def _check_lease(self) -> Self:
        if self.LEASE_SECONDS < 3 * self.HEARTBEAT_SECONDS:
            raise ValueError(
                f"LEASE_SECONDS ({self.LEASE_SECONDS:g}) must be at least three times "
                f"HEARTBEAT_SECONDS ({self.HEARTBEAT_SECONDS:g}), since one heartbeat may fail, "
                "and a node gives up its runs a sixth of the lease before it ends"
            )
        return self

    @model_validator(mode="after")
    def _check_backup_database(self) -> Self:
        url = self.BACKUP_DATABASE_URL or self.DATABASE_URL
        kinds = {make_url(each).get_backend_name() for each in (url, self.DATABASE_URL)}
        if url != self.DATABASE_URL and kinds != {"postgresql"}:
            raise ValueError(
                "BACKUP_DATABASE_URL names another role for the PostgreSQL database of "
                "DATABASE_URL: both have to be postgresql://, or leave it empty"
            )
        return self

    @model_validator(mode="after")
    def _check_pooler(self) -> Self:
        if self.BATCH_DATABASE_POOLER is not None:
            refuse_session_options(DATABASE_URL=self.DATABASE_URL, LEDGER_URL=self.LEDGER_URL)
        return self

    @model_validator(mode="after")
    def _check_loop_block(self) -> Self:
        if 0 < self.MAX_LOOP_BLOCK < SHORTEST_BLOCK:
            raise ValueError(
                f"MAX_LOOP_BLOCK ({self.MAX_LOOP_BLOCK:g}) must be 0 (never) or at least "
                f"{SHORTEST_BLOCK:g}, because every event loop is blocked for short times"
            )
        return self

    @model_validator(mode="after")
    def _check_backup_place(self) -> Self:
        if self.BACKUP_URL:
            refuse_one_place(self.BACKUP_DIR, self.BACKUP_URL)
        return self

    @model_validator(mode="after")
    def _check_pools(self) -> Self:
        _ = self.pools  # raises ValueError
        return self

    @property
    def _given(self) -> dict[str, Any]:
        """All keys of `.env` that are not fields, and the whole environment, by name."""
        return {**(self.model_extra or {}), **self._environment}

    @property
    def sources(self) -> dict[str, str]:
        """The source of each setting that is set: the environment, `.env` or `pyproject.toml`.

        It reads `.env`.
        """
        in_env_file = DotEnvSettingsSource(type(self)).env_vars

        def source_of(name: str) -> str:
            if self._environment.get(name):
                return "environment"
            return str(ENV_FILE if in_env_file.get(name) else PROJECT_FILE)

        return {name: source_of(name) for name in self.model_fields_set}

    @property
    def pools(self) -> dict[str, Pool]:
        """What serves each pool that a setting BATCH_POOL_… describes, by the name of the pool."""
        return pools_of(self._given)

    @property
    def ledger_url(self) -> str:
        """The URL of the ledger's database, with its async driver."""
        url = make_url(self.LEDGER_URL or self.DATABASE_URL)
        if self.LEDGER_URL or url.get_backend_name() == "postgresql":
            return self.LEDGER_URL or self.DATABASE_URL
        folder = os.path.dirname(url.database or "") if url.get_backend_name() == "sqlite" else ""
        return f"sqlite+aiosqlite:///{os.path.join(folder or '.', 'ledger.db')}"

    @property
    def alert_urls(self) -> dict[str, list[str]]:
        """The URLs of Apprise by the name of their channel; those for all tasks have the name
        "".
        """
        return alert_urls(self.BATCH_ALERT_URLS, self._given)

    @property
    def ledger_setting(self) -> str:
        """The name of the setting that says where the ledger is. Messages name it."""
        return "LEDGER_URL" if self.LEDGER_URL else "DATABASE_URL"

    @property
    def backup_database(self) -> tuple[str, str]:
        """The database to back up and restore: the name of its setting, and its URL. Raises
        BackupError if that is the address of a pooler.
        """
        if self.BACKUP_DATABASE_URL:
            return "BACKUP_DATABASE_URL", self.BACKUP_DATABASE_URL
        is_server = make_url(self.DATABASE_URL).get_backend_name() == "postgresql"
        if self.BATCH_DATABASE_POOLER is not None and is_server:
            raise BackupError(f"{WITHOUT_POOLER} (BATCH_DATABASE_POOLER is set)")
        return "DATABASE_URL", self.DATABASE_URL

    @property
    def owner_url(self) -> str:
        """The URL of the database for the role that has to own new tables, which is that of
        DATABASE_URL.
        """
        if self.BATCH_DATABASE_POOLER is None or not self.BACKUP_DATABASE_URL:
            return self.DATABASE_URL
        return with_login_of(self.DATABASE_URL, self.BACKUP_DATABASE_URL)

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """Hide values that may be secret, because a repr appears in logs and in the output of
        failed tests.
        """
        for name, value in super().__repr_args__():
            is_open = name in Settings.model_fields and not str(name).endswith(SECRET)
            yield name, value if is_open or value is None else "***"

    def __getattr__(self, name: str) -> str:
        """The value of an author's own setting from the environment or `.env`. Raises
        AttributeError if it has none.
        """
        if not name.isupper():
            return super().__getattr__(name)  # type: ignore[misc,no-any-return]
        # An author's own setting is read when it is used, so that a test may set it later.
        own = {**(self.model_extra or {}), **os.environ}
        if name not in own:
            raise AttributeError(
                f"there is no setting {name}: neither the environment nor {ENV_FILE} has it"
            )
        return str(own[name])
