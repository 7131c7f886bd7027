"""The tasks. Drop a file with a task here: its class registers itself when the service starts."""
