"""Loads distributed, which the extra `dask` installs, only when a pool needs it."""

from __future__ import annotations

from batch_system.errors import InvalidSetting


def load(setting: str) -> None:
    """Import distributed, which takes about a second. Raises InvalidSetting, which names the
    setting that needs it.

    Its own logging setup, which happens at the import, is left out, so that its lines go where
    those of the process go.
    """
    try:
        import dask
    except ImportError:
        raise InvalidSetting(
            f"setting {setting}: Dask needs the extra `dask` (batch-system[dask]): "
            "pip install 'batch-system[dask]'"
        ) from None
    with dask.config.set(
        {"logging": {"version": 1, "disable_existing_loggers": False, "incremental": True}}
    ):
        try:
            import distributed as distributed
        except ImportError as error:
            raise InvalidSetting(
                f"setting {setting}: Dask needs the extra `dask` (batch-system[dask]), and "
                f"{error.name} is missing: "
                "pip install 'batch-system[dask]'"
            ) from None
