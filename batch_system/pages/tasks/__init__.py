"""The list of tasks, a task, and the forms to start, pause, mute and backfill one."""
