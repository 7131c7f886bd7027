"""What an application may import as `service.batch.scheduler`."""

from service.batch.firing.apscheduler import create_scheduler as create_scheduler
from service.batch.firing.apscheduler import start_scheduler as start_scheduler
from service.batch.firing.apscheduler import stop_scheduler as stop_scheduler
