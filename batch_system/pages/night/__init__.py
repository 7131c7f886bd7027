"""Night, and the pages and forms that its rows lead to."""
