"""The settings of alerts: the channels, and what counts as late or slow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr
from pydantic_settings import BaseSettings

DAY = 86_400.0
NAMED = "BATCH_ALERT_URL_"
"""Settings with this prefix have the URLs of a channel that tasks name: BATCH_ALERT_URL_PAYMENTS is
"payments".
"""

_NAME = re.compile(rf"{NAMED}([A-Z0-9_]{{1,100}})")


def _web_url(url: SecretStr) -> SecretStr:
    parts = urlsplit(url.get_secret_value())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it must be an http or https address")  # the value may have a secret
    return url


def _public_url(url: str) -> str:
    parts = urlsplit(url)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.username
        or parts.query
        or parts.fragment
    ):
        raise ValueError(
            "it must be an http or https address without a user, a query and a fragment"
        )
    return url.rstrip("/")


WebUrl = Annotated[SecretStr, AfterValidator(_web_url)]
PublicUrl = Annotated[str, AfterValidator(_public_url)]


class AlertSettings(BaseSettings):
    """The settings of alerts, as a part of all settings."""

    BATCH_ALERT_URLS: SecretStr | None = Field(
        None,
        description="Where incidents are sent: URLs of Apprise, separated by spaces or lines. "
        "Empty: nowhere.",
    )
    BATCH_ALERT_WEBHOOK: WebUrl | None = Field(
        None, description="Address that incidents are posted to as JSON."
    )
    BATCH_ALERT_WEBHOOK_SECRET: SecretStr | None = Field(
        None,
        description="Secret by which the posts to BATCH_ALERT_WEBHOOK are signed. "
        "Empty: they are not.",
    )
    BATCH_ALERT_LATE_AFTER: float = Field(
        300.0,
        gt=0,
        le=30 * DAY,
        description="Seconds after which a slot whose run has not started is an incident.",
    )
    BATCH_ALERT_SLOW_FACTOR: float = Field(
        3.0,
        ge=1,
        le=1_000,
        description="A run is slow after this many times what 95 of 100 runs of its task take.",
    )
    BATCH_ALERT_NODE_AFTER: float = Field(
        60.0,
        gt=0,
        le=DAY,
        description="Seconds that runs of a lost node may wait before that is an incident.",
    )
    BATCH_ALERT_BACKUP_AFTER: float = Field(
        2 * DAY,
        gt=0,
        le=366 * DAY,
        description="Age in seconds at which the newest verified backup is an incident.",
    )
    BATCH_ALERT_PAUSED_AFTER: float = Field(
        7 * DAY,
        ge=0,
        le=366 * DAY,
        description="Age in seconds at which a pause without an end is an incident. 0: never.",
    )
    BATCH_ALERT_REPEAT: float = Field(
        0.0,
        ge=0,
        le=30 * DAY,
        description="Seconds after which an open incident is sent again. 0: never.",
    )
    BATCH_DIGEST_CRON: str | None = Field(
        None, description="When a summary of the night is sent (UTC). Empty: never."
    )
    BATCH_DIGEST_URLS: SecretStr | None = Field(
        None, description="Where it is sent: URLs of Apprise."
    )
    BATCH_PING_URL: WebUrl | None = Field(
        None,
        description="Address that is called each minute while the service fires and writes. "
        "Empty: none.",
    )
    BATCH_PUBLIC_URL: PublicUrl | None = Field(
        None,
        description="Address of this service for people, for the links in messages. "
        "Empty: no links.",
    )


def alert_urls(urls: SecretStr | None, given: Mapping[str, object]) -> dict[str, list[str]]:
    """The URLs of Apprise by the name of their channel. `given`: all settings by name, including
    those that are not fields.
    """
    named = {
        match[1].lower(): str(value).split()
        for name, value in given.items()
        if (match := _NAME.fullmatch(name))
    }
    for_all = urls.get_secret_value().split() if urls is not None else []
    return {"": for_all, **{name: its for name, its in sorted(named.items()) if its}}
