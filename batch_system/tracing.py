"""Spans of OpenTelemetry: one for each attempt, linked to the code that asked for its run.

OpenTelemetry is used only if the process has imported it, as `opentelemetry-instrument` and
applications with traces do. Otherwise everything here does nothing, and nothing is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.trace import Link, Span

SCOPE = "batch-system"
"""The name under which the spans are exported."""

SUPPRESSED = "suppress_instrumentation"
"""While this is set in the context of OpenTelemetry, its instrumentation of SQLAlchemy and httpx
makes no spans.
"""


def is_in_use() -> bool:
    """Whether this process uses OpenTelemetry."""
    return "opentelemetry.trace" in sys.modules


def is_recorded() -> bool:
    """Whether a provider of traces has been set in this process, so that a span may be recorded."""
    if not is_in_use():
        return False
    from opentelemetry import trace

    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def traceparent() -> str | None:
    """The span that this code runs in, as the W3C header `traceparent` of 55 characters; None if
    there is none.
    """
    if not is_in_use():
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    headers: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(headers)
    return headers.get("traceparent")


def begin(
    context: Context, name: str, attributes: Mapping[str, str | int], caller: str | None
) -> Span | None:
    """Begin a span that is the current one in `context`, in a trace of its own. None if no trace is
    recorded.

    `caller`: the `traceparent` of the code that asked for this work, to which the span is linked.
    The work may begin hours later and several times, so it is not part of the caller's trace.
    """
    if not is_recorded():
        return None
    from opentelemetry import trace
    from opentelemetry.context import Context as Traced
    from opentelemetry.context import attach

    span = trace.get_tracer(SCOPE).start_span(
        name, Traced(), kind=trace.SpanKind.CONSUMER, attributes=attributes, links=_links(caller)
    )
    if not span.is_recording():
        return None
    context.run(attach, trace.set_span_in_context(span, Traced()))
    return span


def _links(caller: str | None) -> list[Link]:
    if caller is None:
        return []
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    remote = TraceContextTextMapPropagator().extract({"traceparent": caller})
    context = trace.get_current_span(remote).get_span_context()
    return [trace.Link(context)] if context.is_valid else []


def end(span: Span | None, outcome: str, error: str | None) -> None:
    """End the span of an attempt. `error`: what went wrong, in one line; None if nothing did."""
    if span is None:
        return
    from opentelemetry.trace import StatusCode

    span.set_attribute("batch.outcome", outcome)
    if error is not None:
        span.set_status(StatusCode.ERROR, error)
    span.end()


@contextmanager
def suppressed() -> Iterator[None]:
    """Statements and requests within the block, and in event loops that are started in it, have no
    spans.

    The service reads the ledger each second, and nobody looks for that in a trace.
    """
    if not is_in_use():
        yield
        return
    from opentelemetry.context import attach, detach, set_value

    token = attach(set_value(SUPPRESSED, True))
    try:
        yield
    finally:
        detach(token)
