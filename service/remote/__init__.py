"""The operations of a service, asked over its HTTP API. Knows no ledger."""
