from sqlalchemy import select

from service import BaseTask
from shop.models import Order


class ShipOrdersTask(BaseTask):
    """Ship new orders, in chunks of two."""

    name = "ship_orders"
    schedule = None

    async def run(self) -> int:
        orders = self.chunks(select(Order).where(Order.state == "new"), key=Order.id, size=2)
        async for chunk in orders:
            async with chunk as (_, found):
                for order in found:
                    order.state = "shipped"
        return orders.done
