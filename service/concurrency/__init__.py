"""Threads and background loops of the service's own, the limits of their waits, and what looks at
all loops.
"""
