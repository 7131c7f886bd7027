"""What is likely to be a mistake in a task's declaration or source. Pure: no database, no clock."""
