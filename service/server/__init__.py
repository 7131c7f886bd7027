"""One process that serves: its lifespan, its signals, uvicorn around it, and its reloads."""
