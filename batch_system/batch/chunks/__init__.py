"""Loops that commit their data and their position together. Knows the current run, not who started
it.
"""
