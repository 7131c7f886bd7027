"""What became of the slots of a window, counted exactly: a tally of what is over, and a count of
the rest.
"""
