"""The account: the run, the reason or the gap of every slot of an interval. Reads the ledger and
changes nothing.
"""
