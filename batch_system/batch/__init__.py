"""Tasks, their slots and their runs. Each room imports only the rooms below it."""
