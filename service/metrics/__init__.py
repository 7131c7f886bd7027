"""What a service has counted and measured since it started, as plain numbers in memory. Knows no
database.
"""
