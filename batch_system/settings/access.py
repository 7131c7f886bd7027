"""The settings of access by HTTP: who may ask, how often, and what is hidden. Alone, because each
subject of the settings has a module of its own.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings

SECRET_WORDS = ("password", "token", "secret", "key", "authorization")


class AccessSettings(BaseSettings):
    """The settings of access, as a part of all settings."""

    BATCH_AUTH: Literal["on", "off"] = Field(
        "on",
        description="Whether the API asks for a token or a sign-in. "
        "off: only where HOST is a loopback address.",
    )
    BATCH_ALLOWED_HOSTS: str = Field(
        "",
        description="Names in the Host header that are answered, by commas. "
        "Empty: loopback names and HOST. *: all.",
    )
    BATCH_PAGES: Literal["on", "off"] = Field(
        "on", description="Whether the service shows pages for people. off: only the API answers."
    )
    BATCH_AUTH_HEADER: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9-]+$",
        description="Header in which a trusted proxy names the person. Empty: none.",
    )
    BATCH_AUTH_GROUPS_HEADER: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9-]+$",
        description="Header in which that proxy names the person's groups, by commas. Empty: none.",
    )
    BATCH_TRUSTED_PROXIES: str = Field(
        "",
        description="Addresses or networks of proxies whose BATCH_AUTH_HEADER is believed, "
        "by commas.",
    )
    BATCH_AUTH_ROLES: str = Field(
        "",
        description="Roles of these people and groups, such as "
        "*@acme.example=viewer,group:oncall=operator.",
    )
    BATCH_REQUESTS_PER_SECOND: int = Field(
        100,
        ge=1,
        le=100_000,
        description="Requests that one token may make in a second, in one process.",
    )
    BATCH_FAILED_SIGN_INS: int = Field(
        20,
        ge=1,
        le=100_000,
        description="Wrong tokens that an address may send in a minute, to one process.",
    )
    BATCH_SECRET_WORDS: str = Field(
        ",".join(SECRET_WORDS),
        description="A parameter whose name has one of these words is shown as ***.",
    )
