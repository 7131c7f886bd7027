"""Threads and background loops of the service's own, beside those of the event loop."""
