"""`python -m service` is the `batch` command."""

from service.cli import main

main()
