"""The format of a backup's file: writing, reading and verifying it. Trusts nothing that a file
says.
"""
