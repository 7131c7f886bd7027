"""Changes of many runs or slots at once, each with a preview."""
