"""The instants of a cron expression in a time zone. Pure: no database, no clock, no task."""
