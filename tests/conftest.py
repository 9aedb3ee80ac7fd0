import os
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _accelerate_forgets():
    """The precision that one test asked for is in the environment and in objects that all of a process share."""
    before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ.update(before)
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state()
        state.GradientState._reset_state()


def pytest_collection_modifyitems(config, items):
    """Two workers begin with a half each: both have their slow tests first, and steal quick ones in the end."""
    if not hasattr(config, "workerinput"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    quick = [item for item in items if not item.get_closest_marker("slow")]
    shared = {"drawn", "wheel"}  # made once a worker
    together = [item for item in slow if shared & set(item.fixturenames)]
    apart = [item for item in slow if not shared & set(item.fixturenames)]
    items[:] = [*together, *apart[::2], *quick[::2], *apart[1::2], *quick[1::2]]
