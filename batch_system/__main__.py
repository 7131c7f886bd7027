"""`python -m batch_system` is the `batch` command."""

from batch_system.cli import main

main()
