"""Example tasks, one file each. The folder can be used as a folder of tasks: `TASKS_DIR=examples
batch tasks`.
"""
