"""`python -m batch_system` is the `batch` command."""

from batch_system import interrupts


def main() -> None:
    """The entry point of `batch`."""
    interrupts.end_at_once()
    from batch_system import cli

    cli.main()


if __name__ == "__main__":
    main()
