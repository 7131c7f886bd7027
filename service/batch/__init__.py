"""Tasks and the scheduler, under the names that the template documents."""

from batch_system import BaseTask as BaseTask
from batch_system import TaskRegistry as TaskRegistry
from batch_system import create_scheduler as create_scheduler
from batch_system import start_scheduler as start_scheduler
from batch_system import stop_scheduler as stop_scheduler
