"""What an author declares, and where it is found. Knows no run and no slot."""
