"""Sends what the outbox holds, by Apprise and to a webhook, and calls dead man's switches. Knows no
incidents.
"""
