"""Maintenance windows: pauses and mutes of many tasks at a time, now or later."""
