import os

import pytest


@pytest.fixture(autouse=True)
def fast_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated kill does not drop the page cache: tests only need to know that fsync is called, and when."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
