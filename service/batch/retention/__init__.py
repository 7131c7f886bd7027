"""Deletes what is old, and decides when. Knows no settings."""
