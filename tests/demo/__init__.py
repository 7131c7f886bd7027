"""A ledger of a made-up fortnight, for pictures and for trying things out: `python -m tests.demo
FOLDER`.
"""
