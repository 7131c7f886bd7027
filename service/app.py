"""The ASGI application of this clone: `uvicorn service.app:app`. Its lifespan runs the scheduler.

Routes, middleware and state of your own are added to `app` here; docs/fastapi.md shows how the
service is added to an application that exists already.
"""

from batch_system.app import app as app
from batch_system.app import create_app as create_app
from batch_system.app import lifespan as lifespan
