"""What `/metrics` shows of a service: a snapshot of this process, and the gauges of its ledger."""

from __future__ import annotations

from collections import Counter

from service.batch.execution.local_engine import LocalEngine
from service.batch.nodes.node import Node
from service.metrics.process import ProcessMetrics, ProcessSnapshot
from service.operations.operations import Operations


class Monitoring:
    """Answers what monitors ask of one service. It belongs to the event loop of the service."""

    def __init__(
        self, metrics: ProcessMetrics, engine: LocalEngine, node: Node, operations: Operations
    ) -> None:
        self.metrics = metrics
        self.gauges = operations.gauges(metrics)
        """Reads the gauges of the ledger. Call its `stop` before the databases are closed."""
        self._engine = engine
        self._node = node

    def snapshot(self) -> ProcessSnapshot:
        """The metrics of this process at this instant, with those of the attempts that go on."""
        items: Counter[str] = Counter()
        dropped = 0
        for attempt in self._engine.attempts:
            dropped += attempt.state.log.dropped
            if (done := attempt.state.loops.done_here) > 0:
                items[attempt.task.name] += done
        return ProcessSnapshot.of(
            self.metrics,
            running_items=items,
            running_dropped=dropped,
            running=self._engine.running,
            leases_lost=self._engine.losses,
            loop_lag=self._node.loop_lag,
        )
