"""Search: what words mean, what they find, and what can be done about it."""
