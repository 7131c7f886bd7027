"""TaskRegistry, under the name that the template documents."""

from batch_system import TaskRegistry as TaskRegistry
