"""The ledger's rows by which slots of many days are counted at once."""
