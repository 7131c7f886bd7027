"""The service's own threads and background loops, time limits for their waits, and the supervisor
of all loops.
"""
