"""accelerate: where its gradient accumulation ends. All else works through the engine that ``prepare`` returned."""

import sys


def accelerate_syncs() -> bool | None:
    """Whether accelerate means the coming backward to be followed by a step; None where it is not in use."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.is_initialized():
        return None
    return bool(state.GradientState().sync_gradients)
