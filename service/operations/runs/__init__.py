"""What people ask of runs: lists, details, logs, cancelling, retrying, quarantine and pruning."""
