"""What people ask of runs: lists, details, logs, what is late, cancelling, retrying, quarantine."""
