"""Adds the time before the last night: `python -m batch_system.demo.filling FOLDER`. Alone, because
it is a process beside the one that serves.
"""

import asyncio
import sys
from pathlib import Path

from batch_system.demo import making

if __name__ == "__main__":
    asyncio.run(making.fill(Path(sys.argv[1])))
