"""What a command says of itself."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest


def help_of(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> str:
    """Return what the module's command prints of ``--help``: in this process, as importing takes seconds."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *words, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert not ended.value.code
    return capsys.readouterr().out
