"""What became of the slots of a window, counted exactly: a tally of past buckets, and a count of
the rest.
"""
