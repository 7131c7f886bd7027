"""Folders and buckets that hold backups, their pins, and which backups are kept. Knows no
database.
"""
