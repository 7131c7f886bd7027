"""Deletes old rows, and decides when. Knows no settings."""
