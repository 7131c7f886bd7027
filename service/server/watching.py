"""The parts of a service that notice what goes wrong and tell people: watch, sender, tally, digest
and pings.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from service.alerts.channels import Channels
from service.alerts.pings import Pings
from service.alerts.sender import Sender
from service.batch.execution import pings
from service.batch.incidents.watch import Watch
from service.batch.incidents.watched import Thresholds
from service.batch.night.keeper import TallyKeeper
from service.batch.nodes.ledger_poll import LedgerChanges
from service.batch.nodes.node import Node
from service.concurrency.background import Background
from service.concurrency.supervisor import Supervisor
from service.database.engine import Database
from service.metrics.process import ProcessMetrics
from service.operations.operations import Operations
from service.server.digest import Digest
from service.settings.settings import Settings


class Watching:
    """`watch` is the watch of this process. `parts` are all of them, to be started and stopped with
    the service.
    """

    def __init__(
        self,
        settings: Settings,
        channels: Channels,
        ledger: Database,
        application: Database,
        node: Node,
        metrics: ProcessMetrics,
        operations: Operations,
    ) -> None:
        secret = settings.BATCH_ALERT_WEBHOOK_SECRET
        sender = Sender(
            ledger,
            node.id,
            channels,
            self._holds,
            secret=secret.get_secret_value() if secret is not None else None,
            public_url=settings.BATCH_PUBLIC_URL,
            metrics=metrics,
        )
        keeper = TallyKeeper(ledger, node.id, self._holds, node.outage)
        self.watch = Watch(
            ledger,
            application,
            node.id,
            _thresholds(settings),
            channels.named,
            sender.wake,
            node.outage,
            on_noticed=keeper.wake,
            lease=settings.LEASE_SECONDS,
        )
        self.parts: list[Background] = [self.watch, sender, keeper]
        self._digest: Digest | None = None
        if settings.BATCH_DIGEST_CRON is not None and channels.digest():
            self._digest = Digest(
                operations, ledger, settings.BATCH_DIGEST_CRON, channels.digest(), self._holds
            )
            self.parts.append(self._digest)

    def on_changes(self, changes: LedgerChanges) -> None:
        """Take the result of a ledger poll."""
        self.watch.on_changes(changes)
        if self._digest is not None:
            self._digest.on_changes(changes)

    def _holds(self) -> bool:
        return self.watch.holds


def _thresholds(settings: Settings) -> Thresholds:
    return Thresholds(
        late_after=settings.BATCH_ALERT_LATE_AFTER,
        slow_factor=settings.BATCH_ALERT_SLOW_FACTOR,
        node_after=settings.BATCH_ALERT_NODE_AFTER,
        backup_after=settings.BATCH_ALERT_BACKUP_AFTER,
        repeat=settings.BATCH_ALERT_REPEAT,
    )


def start_pings(
    settings: Settings, is_working: Callable[[], bool], supervisor: Supervisor
) -> Callable[[], Awaitable[None]]:
    """Call dead man's switches from now on. Returns what has to be awaited at the end."""
    url = settings.BATCH_PING_URL
    calls = Pings(url.get_secret_value() if url is not None else None, is_working)
    supervisor.start(calls)
    pings.use(calls.tell)

    async def end() -> None:
        pings.use(None)
        await calls.stop()

    return end
