"""The expressions that are sent to a cluster, for its workers to evaluate. Alone, because the
workers may lack the rest of this package.

A scheduler unpickles whatever it passes on, and so does each worker. An expression needs nothing
but Python there, so a cluster may have workers without this package, or with an older one: these do
other work, and no ticket reaches them.
"""

from __future__ import annotations

from typing import Any

from distributed import WorkerPlugin


def expression(module: str, function: str, *arguments: str | float | list[str]) -> str:
    """An expression that imports a module, and calls this function of it."""
    return f"__import__({module!r}, fromlist=['*']).{function}({', '.join(map(repr, arguments))})"


def only_with(module: str, text: str, otherwise: str) -> str:
    """An expression that is `text` where this module is installed, and `otherwise` elsewhere."""
    names = module.split(".")
    parents = tuple(".".join(names[: number + 1]) for number in range(len(names)))
    find = "__import__('importlib.util', fromlist=['*']).find_spec"
    return f"{text} if all({find}(name) for name in {parents!r}) else {otherwise}"


class PluginByName(WorkerPlugin):
    """Becomes the plugin that a function of this module returns, or one that does nothing where the
    module is missing.
    """

    idempotent = True
    """A second service that registers it does not replace it in the workers, which would end their
    nodes.
    """

    def __init__(self, module: str, function: str, pools: list[str]) -> None:
        self._module = module
        self._text = expression(module, function, pools)

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (
            only_with(self._module, self._text, "__import__('distributed').WorkerPlugin()"),
        )
