"""An application with the endpoints of the service, and its adaptation to an application around
it.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.types import Message, Receive, Scope, Send

from batch_system.errors import BatchError
from batch_system.operations.asking.actor import Actor as Actor
from batch_system.operations.asking.actor import Role as Role
from batch_system.pages.frame.answers import not_found
from batch_system.pages.routes import routes as pages
from batch_system.server.lifespans import lifespan as lifespan
from batch_system.server.lifespans import lifespan_with_logs
from batch_system.web.access import Authorize
from batch_system.web.application import Api


class Application(Api):
    """Our application, served by itself or mounted in another one. If mounted, it uses that
    application's state.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await super().__call__(scope, receive, self._with_short_failure(send))
            return
        await super().__call__(scope, receive, send)

    def _with_short_failure(self, send: Send) -> Send:
        """A `send` that reports in one line why the application can't start. Starlette would send a
        traceback.
        """

        async def send_short(message: Message) -> None:
            failure = getattr(self.state, "failure", None)
            if message["type"] == "lifespan.startup.failed" and isinstance(failure, BatchError):
                message = {**message, "message": failure.message}
            await send(message)

        return send_short


def create_app(
    *,
    authorize: Authorize | None = None,
    sign_in_url: str | None = None,
    version: str | None = None,
) -> Starlette:
    """An application with the service's endpoints, to be served by itself or mounted in yours.

    `authorize`: a function, which may be async, that returns the Actor of a request, or None; so
    the users of your application are also users of this one. Tokens of the service stay valid, for
    programs, but people can't sign in to the service itself. `sign_in_url`: where your application
    signs people in; the pages send a browser there if `authorize` returns None. By default such a
    browser gets the answer 401. `version`: that of your application, which the audit records; by
    default the setting BATCH_VERSION.
    """
    app = Application(
        authorize=authorize, sign_in_url=sign_in_url, pages=pages, lifespan=lifespan_with_logs
    )
    app.add_exception_handler(404, not_found)
    app.state.version = version
    return app


app = create_app()
