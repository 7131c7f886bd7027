"""The tasks. A file with a task in this folder is imported when the service starts, and its class
is registered.
"""
