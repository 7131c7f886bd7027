"""Backups and the ledger together, for tasks and commands alike."""
