from batch_system.shipped import backup


class BackupTask(backup.BackupTask):
    """Back up the shop."""
