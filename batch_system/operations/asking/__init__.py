"""What each question needs: databases, the actor, filters, cursors, and the base of all results."""
