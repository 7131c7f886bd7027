"""Sends the messages of the outbox, by Apprise and to a webhook, and calls dead man's switches.
Knows no incidents.
"""
