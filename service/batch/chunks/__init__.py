"""Loops that commit their data and their place together. Knows the current run, not who started
it.
"""
