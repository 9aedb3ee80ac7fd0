"""The passes through the model that a replay makes: which rows go together, and how each pass is run."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kondo_hooks.core.arrival import Arrival
from kondo_hooks.core.kept_rows import Part, pack, same_structure, stands_alone
from kondo_hooks.core.packs import into_passes
from kondo_hooks.core.prefix import by_length
from kondo_hooks.core.readings import Learned
from kondo_hooks.core.replay import AmbiguousRowsError, Replayed, replay, replay_as_known, taking_draws
from kondo_hooks.core.verify import verify
from kondo_hooks.delight.graph import silence
from kondo_hooks.rules.readback import Readback


@dataclass
class Plan:
    """Groups of parts, one a pass.

    Attributes:
        groups: of parts.
        imbalance: with all ranks as one batch, the busiest rank's kept rows over the mean, and that of replayed rows.
    """

    groups: list[list[Part]]
    imbalance: tuple[float, float] | None = None


def find_slots(arrivals: list[Arrival]) -> list[int]:
    """For each call the number of its structure, alike on all ranks; a call that cannot be packed has its own."""
    slots: list[int] = []
    kinds: dict[int, Arrival] = {}
    following = 0
    for a in arrivals:
        alone = stands_alone(a.call)
        same = None if alone else next((n for n, kind in kinds.items() if same_structure(a.call, kind.call)), None)
        if same is None:
            same, following = following, following + 1
            if not alone:
                kinds[same] = a
        slots.append(same)
    return slots


def grouped(parts: list[Part], limit: int | None) -> list[list[Part]]:
    """Rows that can go through the model together, at most ``limit``, and alike in length where they are cut."""
    packs = into_passes([part for part in parts if part.of_packs], limit)
    rows = [part for part in parts if not part.of_packs]
    return packs + [each for group in pack(rows) for each in by_length(group, limit)]


def complete(part: Part) -> Part:
    """A part as it can be run: of calls that are replayed whole or not at all, all rows."""
    return part.whole() if part.call.whole else part


def forward(group: list[Part], learned: Learned, back: Readback | None = None) -> list[Replayed]:
    """Run a group with a graph, and find out by its outputs where inputs keep their rows.

    Where that is known, and ``back`` given, the outputs are compared when it is read: then look at ``settled``.
    """
    if back is not None:
        if (replayed := replay_as_known(group, learned, back)) is not None:
            return [replayed]
        back.read()  # numbers that are none say more than what they lead to
    try:
        return [replay(group, learned)]
    except AmbiguousRowsError:
        return [replay([part.whole()], learned) for part in group]


def settled(replayed: list[Replayed], learned: Learned) -> list[Replayed]:
    """Replays that are known to be the screen's, once those in doubt have been looked at more closely, or run anew."""
    result = []
    for each in replayed:
        if each.in_doubt:
            try:
                verify(each)
            except torch.OutOfMemoryError:
                raise
            except Exception:
                result += forward(each.group, learned)
                continue
        result.append(each)
    return result


def checked(groups: list[list[Part]], learned: Learned, back: Readback) -> list[Replayed]:
    """Run groups with a graph, and hold all of them against their screens with one wait for the device."""
    done = [replayed for group in groups for replayed in forward(group, learned, back)]
    back.read()
    return settled(done, learned)


@contextlib.contextmanager
def as_in_screen(replayed: list[Replayed]) -> Iterator[None]:
    """Around a backward: random numbers as the screen drew them, and nothing at all from rows that stand in."""
    handles = [handle for r in replayed if r.silent for handle in silence(r.outputs)]
    try:
        with taking_draws(part for r in replayed for part in r.group):
            yield
    finally:
        for handle in handles:
            handle.remove()


def share_draws(groups: list[list[Part]]) -> bool:
    """Whether two calls drew from the same state of a generator: the user had seeded it alike.

    Checkpointing repeats draws in the backward by the generator's state alone, so then each has its own backward.
    """
    keys = [key for group in groups for part in group for key in part.call.scene.draws.shapes]
    return len(set(keys)) < len(keys)
