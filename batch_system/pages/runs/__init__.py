"""The list of runs, a run with its log, and the forms that act on one or on many."""
