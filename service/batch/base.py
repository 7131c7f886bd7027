"""BaseTask, under the name that the template documents."""

from batch_system import BaseTask as BaseTask
