"""Example tasks, one file each. They are a tasks folder: `TASKS_DIR=examples batch tasks`."""
