from batch_system.shipped import backup


class BackupTask(backup.BackupTask):
    """Back up the application's database, copy the backup elsewhere, and only then delete old
    backups.
    """
