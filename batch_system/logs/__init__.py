"""Logging: makes loggers, keeps the lines of runs, and renders and writes lines in a thread."""

from batch_system.logs.handlers import catch_up as catch_up
from batch_system.logs.handlers import flush as flush
from batch_system.logs.handlers import keep_run_lines as keep_run_lines
from batch_system.logs.handlers import set_up as set_up
from batch_system.logs.logger import get_logger as get_logger
from batch_system.logs.mode import run_log as run_log
