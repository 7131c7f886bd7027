from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from sqlalchemy import func, select

from batch_system import get_db
from batch_system.app import create_app
from batch_system.app import lifespan as batch_lifespan
from shop.models import Order


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with batch_lifespan(app):
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/batch", create_app())


@app.get("/orders")
async def orders() -> dict[str, int]:
    async with get_db(readonly=True) as db:
        return {"orders": await db.scalar(select(func.count(Order.id))) or 0}
