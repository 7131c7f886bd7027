"""Makes a backup, in a process of its own. It knows neither restores nor the ledger."""
