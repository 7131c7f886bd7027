"""The ledger's rows about incidents: what is wrong, and what has to be sent about it."""
