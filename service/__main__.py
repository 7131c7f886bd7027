"""`python -m service` is the `batch` command."""

from batch_system.cli import main

main()
