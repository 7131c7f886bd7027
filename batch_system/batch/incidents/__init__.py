"""Notices what needs a person, and writes incidents and the messages about them. Sends nothing
itself.
"""
