"""Finds likely mistakes in a task's declaration or source. Pure: no database, no clock."""
