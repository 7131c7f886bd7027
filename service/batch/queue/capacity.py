"""How many more runs this process could start right now."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Capacity:
    """How many more runs this node could start right now: `runs` in all, at most `threads` of them in threads."""

    runs: int
    threads: int

    def take(self, on_loop: bool) -> bool:
        """Reserve the capacity for one run, on the event loop or in a thread. Returns False if there is none left."""
        if self.runs < 1 or (not on_loop and self.threads < 1):
            return False
        self.runs -= 1
        self.threads -= 0 if on_loop else 1
        return True
