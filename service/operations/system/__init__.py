"""What people ask of the system as a whole: its state, its nodes, settings and migrations."""
