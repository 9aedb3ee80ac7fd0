"""TRL."""

from typing import Any


def makes_pairs(trainer: Any) -> bool:
    """Whether a trainer concatenates chosen and rejected answers to one batch, so that row i and i + B/2 are a pair."""
    return any(kind.__name__ == "DPOTrainer" for kind in type(trainer).__mro__)
