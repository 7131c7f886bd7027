"""Threads and background loops of our own, beside those of the event loop."""
