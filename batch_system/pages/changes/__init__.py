"""The page of changes: who did what, what was deployed, and what went wrong in between."""
