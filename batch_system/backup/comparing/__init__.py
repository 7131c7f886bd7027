"""What differs between two states of a database, counted in flat memory."""
