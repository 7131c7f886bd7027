"""The ledger's tables and the queries on them. Knows no event loop and no author's code."""
