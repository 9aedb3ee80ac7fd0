"""The passes through the model that a replay makes: which rows go together, and how each pass is run.

On an engine whose passes communicate, every rank must make the same number of them whatever it keeps. So there calls
are grouped by what all ranks have in common, their structure, and never by sizes; each group makes a number of passes
that all ranks know; and where a rank has no row for one, a row with a gradient of zero stands in.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kondo_hooks.core.arrival import Arrival
from kondo_hooks.core.kept_rows import (
    Part,
    cut,
    pack,
    reading,
    same_constants,
    same_structure,
    same_values,
    stands_alone,
)
from kondo_hooks.core.readings import Learned
from kondo_hooks.core.replay import (
    AmbiguousRowsError,
    Replayed,
    assemble,
    check_unchanged,
    held_layout,
    replay,
    replay_as_known,
    silenced,
    taking_draws,
    with_gradients,
)
from kondo_hooks.core.replay import forward as run_assembled
from kondo_hooks.core.verify import verify, verify_later
from kondo_hooks.delight.graph import silence
from kondo_hooks.errors import ReplayMismatchError
from kondo_hooks.ranks import together as world
from kondo_hooks.ranks.engines import Engine
from kondo_hooks.routes.window import Spread
from kondo_hooks.rows.axes import Layout, Rows
from kondo_hooks.rules.readback import Readback


@dataclass
class Plan:
    """Groups of parts, one a pass, and with all ranks as one batch the rows that each rank replays in each slot."""

    groups: list[list[Part]]
    counts: Tensor


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


def plan(
    arrivals: list[Arrival],
    slots: list[int],
    parts: list[Part | None],
    counts: Tensor | None,
    engine: Engine,
    spread: Spread,
    learned: Learned,
) -> Plan:
    """Which rows go through the model together.

    Args:
        arrivals: the calls.
        slots: the structure of each.
        parts: the kept rows of each, None where there are none.
        counts: (ranks, slots) kept rows, where all ranks decided as one.
        engine: that runs the model.
        spread: what the user asked for.
        learned: where inputs keep their rows, by their paths.
    """
    firsts = [arrivals[slots.index(slot)] for slot in range(max(slots) + 1)]
    by_slot: list[list[Part]] = [[] for _ in firsts]
    for slot, part in zip(slots, parts, strict=True):
        if part is not None:
            by_slot[slot].append(part)
    replayed = torch.tensor([[sum(map(len, slot)) for slot in by_slot]], device="cpu")
    if counts is not None:
        replayed = counts
        if spread.balance:
            replayed = world.even_counts(counts, [not stands_alone(first.call) for first in firsts])
            templates = [_held(first.stand_in(), learned) for first in firsts]
            held = [[_held(part, learned) for part in slot] for slot in by_slot]
            device = templates[0].rows.device if engine.ranks.carries(templates[0].rows.device) else engine.ranks.device
            by_slot = world.balance(held, templates, counts, replayed, engine.ranks, device)
    limit = spread.micro_batch_size
    if not engine.communicates:
        chosen = [_complete(part) for slot in by_slot for part in slot] or [_complete(arrivals[0].stand_in())]
        return Plan(pack(chosen, limit), replayed)
    pieces = [1] * len(firsts)
    if limit is not None:
        pieces = [max(1, -(-sum(map(len, slot)) // limit)) for slot in by_slot]
        if not engine.ranks.alone:
            pieces = engine.ranks.largest(pieces)
    groups = []
    for first, mine, n in zip(firsts, by_slot, pieces, strict=True):
        for group in [mine] if stands_alone(first.call) else cut(mine, n):
            groups.append([_complete(part) for part in group or [first.stand_in()]])
    return Plan(groups, replayed)


def _complete(part: Part) -> Part:
    return part.whole() if part.call.whole else part


def _held(part: Part, learned: Learned) -> Part:
    return part if part.held is not None or stands_alone(part.call) else part.hold(reading(part, learned))


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


def forward_as_one_of_many(
    group: list[Part], first: Arrival, engine: Engine, learned: Learned, back: Readback
) -> list[Replayed]:
    """Run a group on this rank as others run theirs: a failure is told to them and a silent pass takes its place."""
    ranks = engine.ranks
    if engine.communicates:
        return [_exactly_one(group, first, engine, learned, back)]
    try:
        done = forward(group, learned, back)
        back.read()
        done = settled(done, learned)
    except Exception as error:
        if ranks.alone:
            raise
        ranks.announce(error)
        group, inputs, _ = _standing_in(first, learned)
        done = [silenced(group, run_assembled(group, inputs).everything())]
    if ranks.failed:
        for replayed in done:
            replayed.hush()
    return done


def _standing_in(first: Arrival, learned: Learned) -> tuple[list[Part], list[Tensor], list[tuple[Tensor, Rows | None]]]:
    """A row in place of rows that failed, with its inputs and those of them that want a gradient."""
    part = _complete(first.stand_in())
    return [part], *assemble([part], reading(part, learned))


def _exactly_one(group: list[Part], first: Arrival, engine: Engine, learned: Learned, back: Readback) -> Replayed:
    """One forward, whatever happens around it."""
    ranks = engine.ranks
    try:
        check_unchanged(group)
        layout = _common_reading(group, learned)
        inputs, leaves = assemble(group, layout)
    except Exception as error:
        if ranks.alone:
            raise
        ranks.announce(error)
        group, inputs, leaves = _standing_in(first, learned)
    forwarded = run_assembled(group, inputs)
    try:
        replayed = with_gradients(group, forwarded.outputs(), leaves, reading(group[0], learned))
        verify_later(replayed, back)
        back.read()
        if replayed.in_doubt:
            verify(replayed)
    except Exception as error:
        if ranks.alone:
            raise
        ranks.announce(error)
        replayed = silenced(group, forwarded.everything())
    if ranks.failed:
        replayed.hush()
    return replayed


def _common_reading(group: list[Part], learned: Learned) -> Layout:
    """The reading of a group's calls, which have one structure; refuses what else they differ in."""
    first = group[0]
    layout = held_layout(group) or reading(first, learned)
    for part in group[1:]:
        differs = None
        if part.call.rows != first.call.rows:
            differs = "return rows of different lengths, flattened into one axis"
        elif not same_constants(part.call.args, first.call.args):
            differs = "were given different arguments that are no tensors"
        elif any(
            rows is None and not same_values(x, y)
            for rows, x, y in zip(layout, part.inputs(), first.inputs(), strict=True)
        ):
            differs = "were given different values of an input that all rows share"
        elif part.held is None and reading(part, learned) != layout:
            differs = "keep their rows on different axes"
        if differs is not None:
            raise ReplayMismatchError(
                f"gated: calls of one window {differs}, so their kept rows cannot be one batch, and on "
                "this engine every rank has to make the same passes. Make them alike, or use window=1."
            )
    return layout


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
    keys = [key for group in groups for part in group for key in part.call.draws.shapes]
    return len(set(keys)) < len(keys)
