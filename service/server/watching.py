"""Makes the parts of a service that notice what goes wrong and tell people: the watch, the sender and the pings."""

from __future__ import annotations

from service.alerts.channels import Channels
from service.alerts.sender import Sender
from service.batch.incidents.watch import Watch
from service.batch.incidents.watched import Thresholds
from service.batch.night.keeper import TallyKeeper
from service.batch.nodes.node import Node
from service.config import Settings
from service.database.engine import Database
from service.metrics.process import ProcessMetrics


def watching_parts(
    settings: Settings,
    channels: Channels,
    ledger: Database,
    application: Database,
    node: Node,
    metrics: ProcessMetrics,
) -> tuple[Watch, Sender, TallyKeeper]:
    """The watch of this process, the sender of what it writes, and what keeps the tally. `node`: of this process."""
    thresholds = Thresholds(
        late_after=settings.BATCH_ALERT_LATE_AFTER,
        slow_factor=settings.BATCH_ALERT_SLOW_FACTOR,
        node_after=settings.BATCH_ALERT_NODE_AFTER,
        backup_after=settings.BATCH_ALERT_BACKUP_AFTER,
        repeat=settings.BATCH_ALERT_REPEAT,
    )
    secret = settings.BATCH_ALERT_WEBHOOK_SECRET
    sender = Sender(
        ledger,
        node.id,
        channels,
        holds=lambda: watch.holds,
        secret=secret.get_secret_value() if secret is not None else None,
        public_url=settings.BATCH_PUBLIC_URL,
        metrics=metrics,
    )
    keeper = TallyKeeper(ledger, node.id, lambda: watch.holds, node.outage)
    watch = Watch(
        ledger, application, node.id, thresholds, channels.named, sender.wake, node.outage, on_noticed=keeper.wake
    )
    return watch, sender, keeper
