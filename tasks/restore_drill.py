from batch_system.shipped import restore_drill


class RestoreDrillTask(restore_drill.RestoreDrillTask):
    """Prove that the latest backup can be restored. Without RESTORE_DRILL_CRON it only runs when it
    is started.
    """
