"""What happened in a window of time, and what needs a person: one answer for all doors."""
