"""Tasks that come with the package. A file of three lines in TASKS_DIR registers one of them."""
