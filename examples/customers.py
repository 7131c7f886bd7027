"""Send the mails of many customers, so that a customer with many mails holds up no other.

`limit` lets two runs of each customer run at once, and twenty in all; the customers take turns.
`rate` lets ten of each begin within a minute, as the mail server demands. Both hold over all
processes together, and also if one of them dies. A mail that cannot wait goes before the others of
its customer: `start(CustomerMailTask, customer="acme", text="…", priority="high")`.
"""

from batch_system import BaseTask, Limit, Rate, TaskRegistry, get_logger

logger = get_logger(__name__)


class CustomerMailTask(BaseTask):
    """Send a mail to a customer."""

    name = "customer_mail"
    description = "Send a mail to a customer"
    schedule = None  # it is only started by other code, or by hand
    limit = Limit(2, key="customer", total=20, backlog=1_000)
    rate = Rate(10, per=60, key="customer")

    async def run(self, customer: str, text: str = "Hello") -> str:
        logger.info(f"A mail to {customer}", text=text)
        return customer


TaskRegistry.register(CustomerMailTask)
