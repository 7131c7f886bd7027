"""The channels for messages, as the settings define them. Each address is a channel of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batch_system.errors import InvalidSetting
from batch_system.logs import get_logger
from batch_system.settings.settings import Settings

logger = get_logger("batch_system.batch")

WEBHOOK = "webhook"
DIGEST = "digest"
FOR_ALL = "all"


@dataclass(frozen=True)
class Channel:
    """One address. `name`: "all/1" for the first URL for all tasks, "payments/1" for the first URL
    of a name, or "webhook".

    `url` may contain a password, so it is never shown.
    """

    name: str
    url: str

    @property
    def keeps_incidents(self) -> bool:
        """Whether the service behind it keeps incidents itself. Each incident is then told
        separately, with our id, and resolved.
        """
        return self.url.startswith("pagerduty://")

    def __repr__(self) -> str:
        return f"Channel({self.name!r})"


class Channels:
    """All channels of this process, by name."""

    def __init__(self, by_name: Mapping[str, Channel]) -> None:
        self.by_name = dict(by_name)

    @classmethod
    def of(cls, settings: Settings, checked: bool = True) -> Channels:
        """The channels from the settings. `checked`: raise InvalidSetting if one can't be used."""
        taken = settings.alert_urls.keys() & {FOR_ALL, DIGEST, WEBHOOK}
        if checked and taken:
            raise InvalidSetting(
                f"setting BATCH_ALERT_URL_{min(taken).upper()}: this name is taken; use another one"
            )
        urls = {
            name or FOR_ALL: urls for name, urls in settings.alert_urls.items() if name not in taken
        }
        digest = settings.BATCH_DIGEST_URLS
        urls[DIGEST] = digest.get_secret_value().split() if digest is not None else []
        if checked and any(urls.values()):
            _check_apprise(urls)
        channels = [
            Channel(f"{name}/{number}", url)
            for name, its in urls.items()
            for number, url in enumerate(its, start=1)
        ]
        if settings.BATCH_ALERT_WEBHOOK is not None:
            channels.append(Channel(WEBHOOK, settings.BATCH_ALERT_WEBHOOK.get_secret_value()))
        return cls({channel.name: channel for channel in channels})

    def named(self, to: Sequence[str]) -> list[str]:
        """The names of the channels for a task with `Alerts(to=…)`. The webhook, which is for
        programs, gets all messages.

        Names that are in no setting are replaced by the channels for all tasks, so that no message
        is lost.
        """
        names = [name for wanted in to for name in self._of(wanted)] or self._of(FOR_ALL)
        return [*dict.fromkeys(names), *([WEBHOOK] if WEBHOOK in self.by_name else [])]

    def digest(self) -> list[str]:
        """The names of the channels for the summary of the night."""
        return self._of(DIGEST)

    def followers(self) -> list[str]:
        """The names of the channels that follow incidents to their end, even if a person ends
        them.
        """
        return [
            name
            for name, channel in self.by_name.items()
            if name == WEBHOOK or channel.keeps_incidents
        ]

    def _of(self, name: str) -> list[str]:
        return [channel for channel in self.by_name if channel.rpartition("/")[0] == name]


def _check_apprise(urls: Mapping[str, Sequence[str]]) -> None:
    """Refuse URLs that Apprise can't read. They are not shown, because they contain passwords."""
    try:
        from apprise import Apprise
    except ImportError:
        setting = _setting_of(next(name for name, its in urls.items() if its))
        raise InvalidSetting(
            f"setting {setting}: Apprise, which sends to these addresses, is not installed (it is "
            "the extra `alerts`): pip install 'batch-system[alerts]'"
        ) from None
    for name, its in urls.items():
        for number, url in enumerate(its, start=1):
            if Apprise.instantiate(url, suppress_exceptions=True) is None:
                raise InvalidSetting(
                    f"setting {_setting_of(name)}: its URL number {number} can't be used: Apprise "
                    "knows no such address; an example is "
                    "mailto://user:password@mail.example.com?to=you@example.com"
                )


def _setting_of(name: str) -> str:
    """The setting with the addresses of the channels of this name."""
    settings = {FOR_ALL: "BATCH_ALERT_URLS", DIGEST: "BATCH_DIGEST_URLS"}
    return settings.get(name, f"BATCH_ALERT_URL_{name.upper()}")
