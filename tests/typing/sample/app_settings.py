"""The author's own settings, named by SETTINGS=app_settings:AppSettings."""

from pydantic import Field

from batch_system import Settings


class AppSettings(Settings):
    REPORT_RECIPIENTS: list[str] = Field(default_factory=list[str])
    REPORT_CRON: str = "15 6 * * 1-5"
