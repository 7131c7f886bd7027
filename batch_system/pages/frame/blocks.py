"""Renders a page block by block: a block that fails says so, and the others are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from jinja2 import Template
from jinja2.runtime import Context
from markupsafe import Markup

from batch_system.concurrency.offload import offload
from batch_system.logs import get_logger
from batch_system.pages.frame.render import environment

T = TypeVar("T")
logger = get_logger("batch_system.batch")

FAILED = "<!--failed-->"
"""How a block that could not be rendered begins."""


NOTE = "not_refreshed.html"


def noted(html: str, note: str) -> str:
    """A block with a note in its head, or before it if it has none."""
    head, heading, rest = html.partition("</h2>")
    return f"{head}{heading}{note}{rest}" if heading else f"{note}{html}"


def attempt(what: str, make: Callable[[], T]) -> T | None:
    """What `make` returns; None if it fails, which is logged. `what`: the name of what is made."""
    try:
        return make()
    except Exception as error:
        logger.error(f"a part of a page could not be shown: {what}", exc_info=error)
        return None


async def render_blocks(template: str, blocks: Sequence[str], values: Mapping[str, Any]) -> str:
    """The HTML of a template, whose `blocks` are rendered one by one before everything else that is
    in its contents.

    If a value that a block needs is missing in `values`, this block fails. In the blocks after it,
    `failed` has the names of those that have failed. Raises RuntimeError if all of them have.
    """
    return await offload(_render, template, blocks, values)


def _render(template: str, blocks: Sequence[str], values: Mapping[str, Any]) -> str:
    page = environment().get_template(template)
    failed: list[str] = []
    context = page.new_context({**values, "failed": failed})
    made: dict[str, Markup] = {}

    def made_by_itself(name: str) -> Callable[[Context], Iterator[str]]:
        def block(context: Context) -> Iterator[str]:
            if not made:  # by now, the statements at the top of the template have been executed
                for each in blocks:
                    made[each] = _block(page, each, context)
                    if made[each].startswith(FAILED):
                        failed.append(each)
            yield made[name]

        return block

    for name in blocks:
        context.blocks[name] = [made_by_itself(name)]
    html = "".join(page.root_render_func(context))
    if len(failed) == len(blocks):
        raise RuntimeError(f"no block of {template} could be rendered: {', '.join(failed)}")
    return html


def _block(page: Template, name: str, context: Context) -> Markup:
    html = attempt(name, lambda: "".join(page.blocks[name](context)))
    if html is not None:
        return Markup(html)  # noqa: S704
    note = environment().get_template(NOTE)
    values = {"viewer": context["viewer"], "name": name, "at": None}
    return Markup(FAILED + note.render(values))  # noqa: S704
