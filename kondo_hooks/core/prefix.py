"""Rows that are replayed no further than to the last position that is kept of them, with ``unit="prefix"``."""

from dataclasses import replace

import torch
from torch import Tensor

from kondo_hooks.core.compact import RankOne
from kondo_hooks.core.kept_rows import Held, Part, split
from kondo_hooks.core.positions import position_axis

MOST_PASSES = 4
_WORTH = 0.1  # of the positions, for one pass more


def by_length(group: list[Part], limit: int | None) -> list[list[Part]]:
    """A group as the passes that run the fewest positions, each of at most ``limit`` rows."""
    if not is_cut(group):
        return split(group, limit)
    pieces = pieces_of(group)
    if limit is not None and sum(map(len, group)) > limit * pieces:
        return in_pieces(group, -(-sum(map(len, group)) // limit), alike=True)
    return [each for piece in in_pieces(group, pieces) if piece for each in split(piece, limit)]


def is_cut(group: list[Part]) -> bool:
    """Whether the rows of a group end where their last kept position does."""
    return bool(group) and all(part.lengths is not None and part.call.whole is None for part in group)


def pieces_of(group: list[Part]) -> int:
    """Into how many passes a group is best cut."""
    if not is_cut(group):
        return 1
    return _pieces(_lengths(group).sort().values, MOST_PASSES)


def in_pieces(group: list[Part], pieces: int, alike: bool = False) -> list[list[Part]]:
    """A group in so many passes by the lengths of its rows; some are empty where there are fewer rows.

    Args:
        group: of rows that are to be cut.
        pieces: how many.
        alike: as many rows in each, instead of the fewest positions.
    """
    lengths = _lengths(group)
    order, n = lengths.argsort(stable=True), len(lengths)
    ends = [n * (i + 1) // pieces for i in range(pieces)] if alike else _ends(lengths[order], pieces)
    number = torch.empty_like(order)
    for piece, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        number[order[first:last]] = piece
    result: list[list[Part]] = [[] for _ in range(pieces)]
    for part, mine in zip(group, number.split([len(part) for part in group]), strict=True):
        for piece in mine.unique().tolist():
            index = (mine == piece).nonzero().flatten().to(part.rows.device)
            result[piece].append(part if len(index) == len(part) else part.select(index))
    return [[first_of(part, int(_lengths(each).max())) for part in each] for each in result]


def first_of(part: Part, length: int) -> Part:
    """A part's first positions, with what a replay of them needs."""
    positions, call = part.positions, part.call
    assert positions is not None
    if length >= positions.length:
        return replace(part, lengths=None)
    layout = list(positions.layout) if part.held is None else part.held.layout
    inputs = [
        leaf.detach() if where is None else part.input(i, where)
        for i, (leaf, where) in enumerate(zip(part.inputs(), layout, strict=True))
    ]
    outputs: list[Tensor | None] = []
    grads: list[Tensor | RankOne | None] = []
    for i, (where, grad) in enumerate(zip(call.rows, part.grads, strict=True)):
        if where is None or grad is None or i not in positions.outputs:
            outputs.append(None)
            grads.append(None if where is not None else grad)
        elif isinstance(grad, RankOne):
            outputs.append(None)
            grads.append(grad.until(length))
        else:
            output = None if i in call.picked else part.output(i)
            outputs.append(None if output is None else output.narrow(position_axis(where), 0, length))
            grads.append(grad.narrow(position_axis(where), 0, length))
    measures = None if part.held is None else part.held.measures
    held = Held(layout, positions.shorten(inputs, length), outputs, measures)
    return replace(part, held=held, grads=grads, lengths=None, until=length)


def cut_points(lengths: Tensor, most: int) -> list[int]:
    """Where to cut rows, sorted by length, into at most so many passes: the ends of each."""
    return _ends(lengths, _pieces(lengths, most))


def _pieces(lengths: Tensor, most: int) -> int:
    """Into how many passes rows, sorted by length, are best cut: one more has to save some of their positions."""
    costs = [_positions(lengths, n) for n in range(1, most + 1)]
    best = 0
    for n in range(1, len(costs)):
        if costs[n] <= costs[best] - _WORTH * (n - best) * costs[0]:
            best = n
    return 1 + best


def _lengths(group: list[Part]) -> Tensor:
    return torch.cat([part.lengths.cpu() for part in group if part.lengths is not None])


def _ends(lengths: Tensor, pieces: int) -> list[int]:
    """Where to cut rows, sorted by length, so that the fewest positions are run; each row as long as its piece."""
    values, counts = lengths.unique_consecutive(return_counts=True)
    at = [0, *counts.cumsum(0).tolist()]
    if len(values) <= pieces:
        return at[1:] + [len(lengths)] * (pieces - len(values))
    before, high = torch.tensor(at, dtype=torch.float64, device="cpu"), values.double()
    later = torch.arange(len(at), device="cpu")[:, None] > torch.arange(len(values), device="cpu")
    # The positions of the first j lengths in one piece, then in one more: its first is the i-th, its longest the last.
    best, firsts = torch.cat([high.new_zeros(1), high * before[1:]]), []
    each = high * (before[1:] - before[:, None])
    for _ in range(pieces - 1):
        least = (best[:, None] + each).masked_fill(later, torch.inf).min(0)
        best = torch.cat([high.new_zeros(1), least.values])
        firsts.append(least.indices.tolist())
    ends, j = [at[-1]], len(values)
    for first in reversed(firsts):
        j = first[j - 1] if j else 0
        ends.append(at[j])
    return ends[::-1]


def _positions(lengths: Tensor, pieces: int) -> float:
    """How many are run if rows, sorted by length, go in so many pieces."""
    ends = _ends(lengths, pieces)
    spans = [(first, last) for first, last in zip([0, *ends], ends, strict=False) if last > first]
    return sum(float(lengths[last - 1]) * (last - first) for first, last in spans)
