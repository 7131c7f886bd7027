"""The settings of pools: which values are allowed, and how others are refused."""

from __future__ import annotations

import pytest

from batch_system.config import get_settings
from batch_system.errors import InvalidSetting
from batch_system.settings.pools import Pool, pools_of

DASK = [
    ("dask://host", Pool("dask", address="tcp://host:8786")),
    ("dask://10.0.0.1:9000/", Pool("dask", address="tcp://10.0.0.1:9000")),
    ("dask+tls://[::1]:8786", Pool("dask", address="tls://[::1]:8786")),
    (
        "dask://host?resources=GPU%3D1",
        Pool("dask", address="tcp://host:8786", resources=(("GPU", 1.0),)),
    ),
    (
        "dask://host:1?resources=GPU%3D2,DISK%3D1e9",
        Pool("dask", address="tcp://host:1", resources=(("DISK", 1e9), ("GPU", 2.0))),
    ),
]


@pytest.mark.parametrize(("text", "pool"), DASK)
def test_a_pool_may_be_a_dask_cluster(text: str, pool: Pool) -> None:
    assert pools_of({"BATCH_POOL_CPU": text}) == {"cpu": pool}
    assert pool.is_placed


def test_a_pool_may_have_an_own_placer() -> None:
    assert pools_of({"BATCH_POOL_FARM": "placer:farm.placers:Farm"}) == {
        "farm": Pool("placer", placer="farm.placers:Farm")
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("process:4", "process:4"),
        ("nodes", "nodes"),
        ("dask://host?resources=GPU%3D1", "dask://host:8786"),
        ("dask+tls://host", "dask+tls://host:8786"),
        ("placer:farm:Farm", "placer:farm:Farm"),
    ],
)
def test_a_pool_says_in_short_what_its_setting_says(text: str, words: str) -> None:
    assert pools_of({"BATCH_POOL_CPU": text})["cpu"].words == words


@pytest.mark.parametrize(
    "text",
    [
        *(
            "dask://",
            "tcp://host:8786",
            "dask://host:port",
            "dask://host:99999",
            "dask://host/path",
            "dask://host#x",
        ),
        *("dask://host?workers=2", "dask://host?resources=GPU", "dask://host?resources=GPU%3D0"),
        *(
            "dask://host?resources=GPU%3Dnan",
            "dask://host?resources=GPU%3D1e999",
            "placer:farm",
            "placer:farm:",
        ),
        *("threads", "process:0", "nodes:3"),
    ],
)
def test_other_values_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="BATCH_POOL_CPU"):
        pools_of({"BATCH_POOL_CPU": text})


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="without a user or a password") as refused:
        pools_of({"BATCH_POOL_CPU": "dask://me:secret@host:8786"})
    assert "secret" not in str(refused.value)


def test_settings_refuse_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH_POOL_CPU", "dask://")
    with pytest.raises(InvalidSetting, match="dask://HOST:PORT"):
        get_settings()
