"""What the tests of several frameworks need."""

import pytest


@pytest.fixture
def as_torchrun_has_it(monkeypatch):
    """The environment of the only rank."""
    only = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0, "MASTER_ADDR": "127.0.0.1"}
    for name, value in only.items():
        monkeypatch.setenv(name, str(value))
