"""What people ask of tasks: lists, details, history, pausing and checking."""
