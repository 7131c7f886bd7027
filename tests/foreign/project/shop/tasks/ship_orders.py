from sqlalchemy import select

from batch_system import BaseTask
from service import BOX_SIZE
from shop.models import Order


class ShipOrdersTask(BaseTask):
    """Ship new orders, in chunks of a box."""

    name = "ship_orders"
    schedule = None

    async def run(self) -> int:
        orders = self.chunks(select(Order).where(Order.state == "new"), key=Order.id, size=BOX_SIZE)
        async for chunk in orders:
            async with chunk as (_, found):
                for order in found:
                    order.state = "shipped"
        return orders.done
