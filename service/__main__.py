"""`python -m service` is the `batch` command."""

from batch_system.__main__ import main

main()
