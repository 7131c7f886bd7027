"""What can be asked of the system: each verb once. The HTTP API, its client, the commands and the
forms are made from these classes.
"""
