"""What each question needs: databases, the actor, filters and cursors, and the base of all results."""
