"""Hosts that own a training loop and find out about a gate by themselves.

A trainer wraps its model after the context was opened, and knows better than a default what forms a population. Whoever
is in use and owns the gate's model adopts the gate.
"""

import sys
from collections.abc import Callable
from typing import Any


def adopt(gate: Any) -> Callable[[], None]:
    """Let the trainers of the gate's model adopt it; returns what undoes that."""
    if "transformers.trainer" not in sys.modules:
        return lambda: None
    from kondo_hooks.integrations.transformers import adopt

    return adopt(gate)


def accelerate_syncs() -> bool | None:
    """Whether accelerate means the coming backward to be followed by a step; None where it is not in use."""
    if "accelerate" not in sys.modules:
        return None
    from kondo_hooks.integrations.accelerate import accelerate_syncs

    return accelerate_syncs()


def parts_of_rows() -> str | None:
    """By which of a host's options a rank is now given a part of each row's tokens; None where rows are whole."""
    if "verl.utils.ulysses" not in sys.modules:
        return None
    from kondo_hooks.integrations.verl import parts_of_rows

    return parts_of_rows()
