"""One attempt, and the engine that carries it out. Knows no schedule."""
