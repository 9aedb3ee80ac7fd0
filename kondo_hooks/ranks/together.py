"""All ranks as one batch: one decision over their rows, and kept rows moved so that each replays as many.

Every rank computes the same from the same table, so nothing has to be agreed on afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kondo_hooks.core.kept_rows import Part
from kondo_hooks.core.packs import apart, texts_in
from kondo_hooks.errors import RankError, add_note
from kondo_hooks.ranks.agreement import Ranks
from kondo_hooks.rules.readback import to_device
from kondo_hooks.rules.samples import Decision, Kept, Samples, Signal, check_finite
from kondo_hooks.rules.selection import Selector

_COLUMNS = 11  # delight, score, valid, forced, norm, advantage, surprisal, group, begins, slot, row


@dataclass
class World:
    """A decision over all ranks.

    Attributes:
        decision: this rank's part of it; ``price`` and ``rate`` are the world's.
        kept: what is kept of each of this rank's calls.
        counts: (ranks, slots) kept rows of each rank in each slot; -1 where a rank has no call in it.
    """

    decision: Decision
    kept: list[Kept]
    counts: Tensor


def decide(
    selector: Selector,
    samples: Samples | None,
    signals: list[Signal],
    slots: list[int],
    forced: Tensor | None,
    ranks: Ranks,
) -> World:
    """Choose among the rows of all ranks, as one batch in the order of the ranks.

    Args:
        selector: the same on every rank.
        samples: this rank's; None if it failed, and then every rank raises.
        signals: of each of its calls, (B,) or (B, P).
        slots: for each call, which of the structures it has that all ranks have in common.
        forced: (N,) samples of this rank that are kept.
        ranks: who decides.
    """
    if samples is None:
        ranks.gather(None, _COLUMNS)
        raise AssertionError("unreachable: a failed rank raises in gather")
    gathered = ranks.gather(_table(samples, signals, slots, forced, selector.groups), _COLUMNS)
    union = torch.cat(gathered).cpu()  # the host waits for the device once, however many ranks there are
    tables = union.split([len(table) for table in gathered])
    _check_finite(tables, ranks, selector.config.weighs)
    together = Samples(
        union[:, 0],
        None if samples.scores is None else union[:, 1],
        union[:, 2] != 0,
        None if samples.norm is None else union[:, 4],
        union[:, 5],
        union[:, 6],
        begins=None if samples.begins is None else union[:, 8] != 0,
    )
    if selector.groups is not None:
        selector.groups = union[:, 7]
    selector.pool(together)
    decision = selector.choose(together, union[:, 3] != 0)
    factors = decision.factors()
    start, own, device = sum(map(len, tables[: ranks.rank])), tables[ranks.rank], samples.delight.device
    here = (decision.kept >= start) & (decision.kept < start + len(own))
    kept = decision.kept[here] - start
    local = Decision(
        samples.delight,
        to_device(kept, device),
        None if decision.weights is None else to_device(decision.weights[here].to(samples.delight.dtype), device),
        decision.price,
        decision.rate,
        samples=int((own[:, 2] != 0).sum()),
        sum_delight=float(own[:, 0].sum()),
        sum_delight_kept=float(own[kept, 0].sum()),
        norm=samples.norm,
        noise=decision.noise,
        without_gradient=decision.without_gradient,
        largest_factor=decision.largest_factor,
        cost=decision.cost,
    )
    mine = factors[start : start + len(own)].to(samples.delight.dtype)
    return World(local, [Kept.of(each) for each in selector.split(mine, signals)], _counts(tables, factors))


def _check_finite(tables: Sequence[Tensor], ranks: Ranks, norms: bool) -> None:
    """Raise on every rank if a score or a delight of one is NaN or infinite; all of them see the same tables."""
    for rank, table in enumerate(tables):
        scores, delight = (column.masked_fill(table[:, 3] != 0, 0) for column in (table[:, 1], table[:, 0]))
        if norms:
            scores = torch.where(scores.isfinite(), table[:, 4].masked_fill(table[:, 3] != 0, 0), scores)
        try:
            check_finite(scores, delight)
        except ValueError as error:
            if rank == ranks.rank:
                add_note(error, f"Every rank stops here; the first to fail was rank {rank}.")
                raise
            raise RankError(f"gated: rank {rank}: ValueError: {error}\nEvery rank stops here.") from None


def _table(
    samples: Samples, signals: list[Signal], slots: list[int], forced: Tensor | None, groups: Tensor | None
) -> Tensor:
    n = len(samples.delight)
    valid = torch.ones(n, device="cpu") if samples.valid is None else samples.valid
    nothing = torch.zeros(n, device="cpu")
    rows, slot, first = [], [], 0
    tokens = n == sum(s.valid.numel() for s in signals)
    for signal, number in zip(signals, slots, strict=True):
        batch = len(signal.valid)
        per_row = signal.valid.numel() // batch if tokens else 1
        rows.append(torch.arange(first, first + batch, device="cpu").repeat_interleave(per_row))
        slot.append(torch.full((batch * per_row,), number, device="cpu"))
        first += batch
    columns = [
        samples.delight,
        samples.delight if samples.scores is None else samples.scores,
        valid,
        nothing if forced is None else forced,
        *(
            nothing if t is None else t
            for t in (samples.norm, samples.advantages, samples.surprisal, groups, samples.begins)
        ),
        torch.cat(slot),
        torch.cat(rows),
    ]
    device = samples.delight.device
    return torch.stack([to_device(c.to(torch.float64), device) for c in columns], 1)


def _counts(tables: Sequence[Tensor], factors: Tensor) -> Tensor:
    """(ranks, slots): calls that cannot be packed have a slot each, and not all ranks have as many of them."""
    slots = [int(table[:, -2].max()) + 1 for table in tables]
    counts = torch.full((len(tables), max(slots)), -1, dtype=torch.long, device="cpu")
    start = 0
    for rank, table in enumerate(tables):
        kept = factors[start : start + len(table)] != 0
        start += len(table)
        rows = table[kept][:, -2:].unique(dim=0)
        counts[rank, : slots[rank]] = torch.bincount(rows[:, 0].long(), minlength=slots[rank])
    return counts


def imbalance(counts: Tensor) -> float:
    """The busiest rank's kept rows over the mean: 1 is even."""
    rows = counts.clamp_min(0).sum(1).double()
    return float(rows.max() / rows.mean()) if rows.any() else 1.0


def even_counts(counts: Tensor, movable: list[bool]) -> Tensor:
    """(ranks, slots) rows after moving: within one row of each other in each movable slot, and in their sum."""
    target = counts.clone()
    ranks = len(counts)
    extras = [0] * ranks
    for slot, can in enumerate(movable):
        if not can:
            continue
        kept = counts[:, slot].tolist()
        target[:, slot] = sum(kept) // ranks
        # One more for those that had the fewest extra rows so far; of these, for those that kept the most.
        order = sorted(range(ranks), key=lambda rank: (extras[rank], -kept[rank], rank))
        for rank in order[: sum(kept) % ranks]:
            target[rank, slot] += 1
            extras[rank] += 1
    return target


def balance(
    parts: list[list[Part]], templates: list[Part], counts: Tensor, target: Tensor, ranks: Ranks, device: torch.device
) -> list[list[Part]]:
    """Move rows from ranks that kept more than their share to those that kept fewer.

    Args:
        parts: this rank's kept rows in each slot, held, or texts.
        templates: for each slot a held part of this rank, whatever its rows.
        counts: (ranks, slots) kept rows.
        target: (ranks, slots) rows to replay.
        ranks: who takes part.
        device: where collectives run.
    """
    parcels: list[list[list[Tensor]]] = [[] for _ in range(ranks.size)]
    staying = [list(slot) for slot in parts]
    for slot in range(counts.shape[1]):
        for giver, taker, n in _transfers((counts - target)[:, slot].tolist()):
            if giver == ranks.rank:
                staying[slot], leaving = _take_last(staying[slot], n)
                for part in leaving:
                    parcels[taker].append([torch.tensor(slot, device="cpu"), *part.to_tensors()])
    for parcel in ranks.exchange(parcels, device):
        for slot_number, *tensors in parcel:
            slot = int(slot_number)
            staying[slot].append(Part.from_tensors(templates[slot], tensors))
    return staying


def _transfers(surplus: list[int]) -> list[tuple[int, int, int]]:
    """(giver, taker, rows) that bring every surplus to zero, the same on every rank."""
    left, moves = list(surplus), []
    for giver in range(len(left)):
        for taker in range(len(left)):
            if (n := min(left[giver], -left[taker])) > 0:
                moves.append((giver, taker, n))
                left[giver] -= n
                left[taker] += n
    return moves


def _take_last(parts: list[Part], n: int) -> tuple[list[Part], list[Part]]:
    """The parts without their last ``n`` rows or texts, and those, each text by itself."""
    staying, leaving = list(parts), []
    while n:
        last = staying.pop()
        if (size := texts_in(last)) > n:
            staying.append(last.between(0, size - n))
            last = last.between(size - n, size)
        leaving += [last] if last.packed is None else apart(last)
        n -= texts_in(last)
    return staying, leaving
