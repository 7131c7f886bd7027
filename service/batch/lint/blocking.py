"""Calls in the source of a coroutine that block the event loop. Pure: it reads the source, and runs nothing."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

BLOCKING = {
    *("time.sleep", "os.system", "os.popen", "urllib.request.urlopen", "socket.create_connection"),
    *(f"subprocess.{name}" for name in ("run", "call", "check_call", "check_output", "getoutput")),
    *(f"httpx.{name}" for name in ("get", "post", "put", "patch", "delete", "head", "options", "request", "stream")),
}
PACKAGES = ("requests.",)
"""All of their calls block."""


def blocking_calls(run: Callable[..., Any]) -> list[tuple[int, str]]:
    """The line in its file, and the name as it is written, of each such call in the body of `run` itself."""
    function = inspect.unwrap(run)
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):  # made at run time, or within other code on its line
        return []
    known = getattr(function, "__globals__", {})
    return [
        (first + call.lineno - 1, ast.unparse(call.func))
        for call in _calls(tree.body[0])
        if _blocks(_full_name(call.func, known))
    ]


def _calls(node: ast.AST) -> Iterator[ast.Call]:
    """Not those in functions within: they may be meant for a thread."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.Call):
            yield child
        yield from _calls(child)


def _full_name(function: ast.expr, known: dict[str, Any]) -> str:
    """`sleep` as time.sleep, where the module imported it so."""
    root, _, rest = ast.unparse(function).partition(".")
    found = known.get(root)
    if isinstance(found, ModuleType):
        return f"{found.__name__}.{rest}"
    if inspect.isroutine(found):
        return f"{found.__module__}.{found.__qualname__}"
    return f"{root}.{rest}"


def _blocks(name: str) -> bool:
    return name in BLOCKING or name.startswith(PACKAGES) or name.replace("httpx._api.", "httpx.") in BLOCKING
