"""All settings, their allowed values, and the one place that reads them."""
