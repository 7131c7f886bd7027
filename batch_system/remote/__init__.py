"""Asks a service for verbs, over its HTTP API. Knows no ledger."""
