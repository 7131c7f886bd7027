"""What an author's file may import as `service.batch.registry`."""

from service.batch.tasks.registry import TaskRegistry as TaskRegistry
