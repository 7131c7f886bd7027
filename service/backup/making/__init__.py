"""Makes a backup, in a process of its own. Knows no restore and no ledger."""
