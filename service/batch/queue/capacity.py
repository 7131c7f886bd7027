"""How much more this process could start right now."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Capacity:
    """How many more runs this node could start right now: on the event loop, and of those in threads."""

    runs: int
    threads: int

    def take(self, on_loop: bool) -> bool:
        """Reserve a place for one run. False when there is none for it."""
        if self.runs < 1 or (not on_loop and self.threads < 1):
            return False
        self.runs -= 1
        self.threads -= 0 if on_loop else 1
        return True
