"""What people ask of tasks: lists, details, starting, pausing and checking."""
