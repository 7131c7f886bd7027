"""Counts and measurements of a service since it started, as plain numbers in memory. Uses no
database.
"""
