"""The settings: which there are, what is allowed, and the one place that reads them."""
