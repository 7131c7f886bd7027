"""The serving process: its lifespan, its signals, its HTTP server, and its reloads."""
