"""Executes bodies of attempts in child processes, which can be killed. Knows no schedule and claims
no run.
"""
