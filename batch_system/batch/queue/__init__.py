"""Which runs may start next, and how a person starts, cancels and retries runs. Knows no process
and no event loop.
"""
