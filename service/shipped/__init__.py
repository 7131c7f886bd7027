"""Tasks that the package brings. A file of three lines in TASKS_DIR registers one of them."""
