import pytest
from shop.models import Order
from shop.tasks.ship_orders import ShipOrdersTask
from sqlalchemy import select

from batch_system import get_db
from batch_system.testing import Batch


@pytest.mark.asyncio
async def test_a_crash_ships_no_order_twice_and_forgets_none(batch: Batch) -> None:
    async with get_db() as db:
        db.add_all([Order() for _ in range(5)])
        await db.commit()
    await batch.run(ShipOrdersTask, kill_after_chunk=1)
    run = await batch.resume()
    assert (run.state, run.result) == ("succeeded", 5)
    async with get_db(readonly=True) as db:
        assert (await db.scalars(select(Order.state))).all() == ["shipped"] * 5
