"""What an author's file may import as `service.batch.base`."""

from service.batch.tasks.base import BaseTask as BaseTask
