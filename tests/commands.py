"""The `batch` command in the test's own process: quicker than a new one, with its output and its
exit code.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from batch_system import TaskRegistry, cli, config, logs


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Batch = Callable[..., Done]


def in_this_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Batch]:
    """For a fixture: `batch(words, SETTING=value)` runs the command in this process, in the state
    of a new one.
    """

    def call(*words: str, **settings: str) -> Done:
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        config.forget_settings()
        TaskRegistry.clear()
        monkeypatch.setattr(sys, "argv", ["batch", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            cli.main()
        logs.flush()
        out, err = capsys.readouterr()
        return Done(int(exited.value.code or 0), out, err)

    yield call
    logs.set_up()


def refuses(done: Done, *words: str, code: int = 2) -> None:
    """Stderr has one line with these words, and stdout nothing. `code`: 3 if something is out of
    order.
    """
    assert done.code == code, done.err
    assert done.out == ""
    assert re.fullmatch(r"batch: .+\n", done.err), done.err
    for word in words:
        assert word in done.err
