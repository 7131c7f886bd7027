"""What became of every slot of an interval. Reads the ledger and changes nothing."""
