"""What each question to the system needs: the databases, who asks, filters, cursors, and the base of all results."""
