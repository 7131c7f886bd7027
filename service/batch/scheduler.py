"""What an application may import as `service.batch.scheduler`."""

from service.server.by_hand import create_scheduler as create_scheduler
from service.server.by_hand import start_scheduler as start_scheduler
from service.server.by_hand import stop_scheduler as stop_scheduler
