"""Which runs may start next, and what people ask of runs. Knows no process and no event loop."""
