"""Logging: makes loggers, keeps the lines of runs, and renders and writes lines in a thread."""

from service.logs.handlers import catch_up as catch_up
from service.logs.handlers import flush as flush
from service.logs.handlers import keep_run_lines as keep_run_lines
from service.logs.handlers import set_up as set_up
from service.logs.logger import get_logger as get_logger
from service.logs.mode import run_log as run_log
