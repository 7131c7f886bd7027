"""What a limit means beside the other policies of a task: a test for each row of the table in
docs/policies.md, section "Limits and rates".
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from batch_system import Limit, Partition, PartitionedTask, TaskRegistry, clock
from batch_system.batch.firing import pauses
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import RunState
from batch_system.batch.queue import claiming
from batch_system.batch.queue.claiming import Capacity
from batch_system.database.engine import Database
from tests.batch.ledger_world import NODE, know, rows
from tests.batch.test_limits import claim, limited, queue, tenants
from tests.batch.test_runs import ending, finish, insert, new

pytestmark = pytest.mark.rest
