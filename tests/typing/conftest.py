"""What authors write is checked, and run, in a copy: see test_typing.py."""

collect_ignore = ["sample", "refused"]
