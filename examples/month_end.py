"""Runs on the last business day of each month in New York, unless banks are closed."""

from datetime import date, datetime, timedelta

from batch_system import BaseTask, Missed

CLOSED = {
    date(2026, 12, 25): "Christmas Day",
    date(2026, 12, 31): "Inventory",
    date(2027, 1, 1): "New Year's Day",
}


class MonthEnd(BaseTask):
    """Close the books of the month."""

    name = "month_end"
    schedule = "H 18 LB * *"
    timezone = "America/New_York"
    except_on = CLOSED
    missed = Missed("once", max_age=timedelta(days=35))

    async def run(self, slot: datetime) -> str:
        return f"{slot:%Y-%m-%d}"
