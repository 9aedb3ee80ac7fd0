"""The same passes through the model on every rank, whatever each of them keeps.

On an engine whose passes communicate, every rank must make the same number of them. So there calls are grouped by what
all ranks have in common, their structure, and never by sizes; each group makes a number of passes that all ranks know;
and where a rank has no row for one, a row with a gradient of zero stands in.
"""

import torch
from torch import Tensor

from kondo_hooks.core.arrival import Arrival
from kondo_hooks.core.engine import Engine
from kondo_hooks.core.kept_rows import Part, cut, reading, same_constants, same_values, stands_alone
from kondo_hooks.core.packs import into_passes, texts_in
from kondo_hooks.core.passes import Plan, checked, complete, grouped
from kondo_hooks.core.prefix import in_pieces, is_cut, pieces_of
from kondo_hooks.core.readings import Learned
from kondo_hooks.core.replay import Replayed, assemble, check_unchanged, held_layout, silenced, with_gradients
from kondo_hooks.core.replay import forward as run_assembled
from kondo_hooks.core.verify import verify, verify_later
from kondo_hooks.errors import ReplayMismatchError
from kondo_hooks.ranks import together
from kondo_hooks.ranks.agreement import Ranks
from kondo_hooks.rows.axes import Layout, Rows
from kondo_hooks.rules.readback import Readback


def plan(
    arrivals: list[Arrival],
    slots: list[int],
    parts: list[Part | None],
    counts: Tensor | None,
    engine: Engine,
    ranks: Ranks,
    limit: int | None,
    learned: Learned,
) -> Plan:
    """Which rows go through the model together.

    Args:
        arrivals: the calls.
        slots: the structure of each.
        parts: the kept rows of each, None where there are none.
        counts: (ranks, slots) kept rows, where all ranks decided as one.
        engine: that runs the model.
        ranks: that make the same passes.
        limit: most rows in one pass.
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
        if engine.balance:
            stay = [int(i >= len(firsts) or stands_alone(firsts[i].call)) for i in range(counts.shape[1])]
            if bool((counts < 0).any()):  # ranks have other numbers of calls, so a slot may be of another kind there
                stay = ranks.largest(stay)
            replayed = together.even_counts(counts, [not stays for stays in stay])
            templates = [_held(first.stand_in(), learned) for first in firsts]
            held = [[_held(part, learned) for part in slot] for slot in by_slot]
            device = templates[0].rows.device if ranks.carries(templates[0].rows.device) else ranks.device
            by_slot = together.balance(held, templates, counts, replayed, ranks, device)
    imbalance = None if counts is None else (together.imbalance(counts), together.imbalance(replayed))
    if not engine.communicates:
        chosen = [complete(part) for slot in by_slot for part in slot] or [complete(arrivals[0].stand_in())]
        return Plan(grouped(chosen, limit), imbalance)
    pieces = [1] * len(firsts)
    cuts = any(first.cuts for first in firsts)
    if limit is not None or cuts:
        pieces = [pieces_of(slot) for slot in by_slot]
        if limit is not None:
            pieces = [max(n, -(-sum(map(texts_in, slot)) // limit)) for n, slot in zip(pieces, by_slot, strict=True)]
        if not ranks.alone:
            pieces = ranks.largest(pieces)
    groups = []
    for first, mine, n in zip(firsts, by_slot, pieces, strict=True):
        if mine and all(part.of_packs for part in mine):
            each = into_passes(mine, pieces=n)
        elif is_cut(mine):
            each = in_pieces(mine, n, alike=limit is not None)
        else:
            each = [mine, *[[]] * (n - 1 if cuts else 0)] if stands_alone(first.call) else cut(mine, n)
        for group in each:
            groups.append([complete(part) for part in group or [first.stand_in()]])
    return Plan(groups, imbalance)


def _held(part: Part, learned: Learned) -> Part:
    is_held = part.held is not None or part.packed is not None or stands_alone(part.call)
    return part if is_held else part.hold(reading(part, learned))


def forward_as_one_of_many(
    group: list[Part], first: Arrival, engine: Engine, learned: Learned, back: Readback
) -> list[Replayed]:
    """Run a group on this rank as others run theirs: a failure is told to them and a silent pass takes its place."""
    ranks = engine.ranks
    if engine.communicates:
        return [_exactly_one(group, first, engine, learned, back)]
    try:
        done = checked([group], learned, back)
    except Exception as error:
        ranks.fail(error)
        group, inputs, _ = _standing_in(first, learned)
        done = [silenced(group, run_assembled(group, inputs).everything())]
    if ranks.failed:
        for replayed in done:
            replayed.hush()
    return done


def _standing_in(first: Arrival, learned: Learned) -> tuple[list[Part], list[Tensor], list[tuple[Tensor, Rows | None]]]:
    """A row in place of rows that failed, with its inputs and those of them that want a gradient."""
    part = complete(first.stand_in())
    return [part], *assemble([part], reading(part, learned))


def _exactly_one(group: list[Part], first: Arrival, engine: Engine, learned: Learned, back: Readback) -> Replayed:
    """One forward, whatever happens around it."""
    ranks = engine.ranks
    try:
        check_unchanged(group)
        layout = _common_reading(group, learned)
        inputs, leaves = assemble(group, layout)
    except Exception as error:
        ranks.fail(error)
        group, inputs, leaves = _standing_in(first, learned)
    forwarded = run_assembled(group, inputs)
    try:
        replayed = with_gradients(group, forwarded.outputs(), leaves, reading(group[0], learned))
        verify_later(replayed, back)
        back.read()
        if replayed.in_doubt:
            verify(replayed)
    except Exception as error:
        ranks.fail(error)
        replayed = silenced(group, forwarded.everything())
    if ranks.failed:
        replayed.hush()
    return replayed


def _common_reading(group: list[Part], learned: Learned) -> Layout:
    """The reading of a group's calls, which have one structure; refuses what else they differ in."""
    first = group[0]
    layout = held_layout(group) or reading(first, learned)
    # Outputs without a gradient (a router's logits) may hold their rows as they like: nobody takes any.
    used = [any(part.grads[i] is not None for part in group) for i in range(len(first.call.rows))]
    for part in group[1:]:
        differs = None
        if any(u and a != b for u, a, b in zip(used, part.call.rows, first.call.rows, strict=True)):
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
