"""verl: whether ranks share the tokens of each text. All else works through its engine, which a gate is put into."""

import sys


def parts_of_rows() -> str | None:
    """The option by which a rank is now given a part of each text; None where texts are whole."""
    ulysses = sys.modules.get("verl.utils.ulysses")
    if ulysses is None or ulysses.get_ulysses_sequence_parallel_world_size() < 2:
        return None
    return "verl's ulysses_sequence_parallel_size"
