"""The application of the HTTP API: its resources, its document, and what surrounds each answer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

from batch_system.errors import BatchError
from batch_system.web import api, events, sign_in
from batch_system.web.access import Authorize, Guard
from batch_system.web.errors import handle_errors
from batch_system.web.headers import Headed
from batch_system.web.live import Feed
from batch_system.web.problems import Problem
from batch_system.web.proxies import Forwarded, Network
from batch_system.web.routes import made_from_verbs

DOCUMENT = "/api/openapi.json"


class Guarded(FastAPI):
    """Answers by these routes, and guards them: by the Host header, by trusted proxies, and by
    tokens.

    `authorize`: says who makes a request, as the surrounding application knows it. `sign_in_url`:
    where that application signs people in.
    """

    def __init__(
        self,
        *,
        routes: Sequence[BaseRoute],
        authorize: Authorize | None = None,
        sign_in_url: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            openapi_url=None,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
            routes=[*routes],
            **options,
        )
        self._authorize = authorize
        self.sign_in_url = sign_in_url
        self._guard: Guard | None = None
        self._is_mounted = False
        handle_errors(self)
        self.add_middleware(Headed, hosts=self._hosts)
        self.add_middleware(Forwarded, networks=self._proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (parent := scope.get("app")) is not None:
            self._is_mounted = True
            self.state = parent.state
        await super().__call__(scope, receive, send)

    @property
    def signs_in(self) -> bool:
        """Whether people sign in here, and not in the surrounding application."""
        return self._authorize is None

    @property
    def guard(self) -> Guard:
        """The guard of the service that is running now. Raises BatchError if none is running."""
        batch = getattr(self.state, "batch", None)
        if batch is None or not hasattr(batch, "operations"):
            raise NotStarted(api.NOT_STARTED)
        if self._guard is None or self._guard.operations is not batch.operations:
            feed = Feed(batch.operations, batch.node.id, batch.stopping)
            self._guard = Guard(batch.settings, batch.operations, feed, self._authorize)
            batch.before_stop(self._guard.stop)
        return self._guard

    def _proxies(self) -> Sequence[Network]:
        try:
            return self.guard.proxies
        except BatchError:
            return ()

    def _hosts(self) -> Collection[str] | None:
        """The names that may stand in the Host header.

        A surrounding application checks hosts itself, unless BATCH_ALLOWED_HOSTS is set.
        """
        try:
            guard = self.guard
        except BatchError:
            return None
        return guard.hosts if guard.has_named_hosts or not self._is_mounted else None


class Api(Guarded):
    """The endpoints of the service. `pages`: the routes for people, beside those for programs."""

    def __init__(
        self, *, authorize: Authorize | None = None, pages: Sequence[BaseRoute] = (), **options: Any
    ) -> None:
        # `include_router` would analyse them again, at the first request of each application.
        routers = (made_from_verbs(), sign_in.sessions, events.events)
        super().__init__(
            title="Batch System",
            version="1",
            description="Tasks, runs, slots, backups and tokens of the batch service.",
            routes=[*api.routes, *pages, *(route for each in routers for route in each.routes)],
            authorize=authorize,
            **options,
        )
        self.add_api_route(DOCUMENT, self._document, include_in_schema=False)

    def openapi(self) -> dict[str, Any]:
        """The document of the API, OpenAPI 3.1."""
        if self.openapi_schema is None:
            document = get_openapi(
                title=self.title,
                version=self.version,
                description=self.description,
                routes=self.routes,
            )
            schemas = document["components"]["schemas"]
            schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schema.pop("$defs", {}))
            schemas["Problem"] = schema
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            self.openapi_schema = document
        return self.openapi_schema

    async def _document(self, request: Request) -> dict[str, Any]:
        """The document. Its paths are below the one at which this application is mounted."""
        below = request.scope.get("root_path", "")
        return {**self.openapi(), "servers": [{"url": below}]} if below else self.openapi()


class NotStarted(BatchError):
    """The service of this application has not started."""

    kind = "unavailable"
