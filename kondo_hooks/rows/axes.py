"""The batch axis: which axis holds the rows, taking and packing rows.

Knows tensors and nothing of gates.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where a tensor keeps its rows: ``size[axis] == batch * repeat``, each row's block contiguous.

    With ``parts`` it is not: the axis is cut into so many parts, and each has a share of every row. A pair has one half
    of its block in the tensor's first half and the other in its second; of (T * n, F), time first, a part is a step.
    """

    axis: int
    repeat: int = 1
    parts: int = 1

    def take(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """The rows, a copy."""
        rows = rows.to(tensor.device)
        if self.repeat == 1:
            return tensor.index_select(self.axis, rows)
        blocks, axis = self._blocks(tensor)
        return blocks.index_select(axis, rows).flatten(self.axis, self.axis + blocks.dim() - tensor.dim())

    def put(self, full: Tensor, rows: Tensor, values: Tensor) -> Tensor:
        """Write ``values`` into the rows of ``full``, in place."""
        rows = rows.to(full.device)
        if self.repeat == 1:
            return full.index_copy_(self.axis, rows, values)
        blocks, axis = self._blocks(full)
        blocks.index_copy_(axis, rows, self._blocks(values)[0])
        return full

    def first(self, tensor: Tensor) -> Tensor:
        """The rows on axis 0 and, where a row is a block, the block on axis 1; a view where blocks are contiguous."""
        tensor = tensor.movedim(self.axis, 0)
        if self.repeat == 1:
            return tensor
        if self.parts == 1:
            return tensor.unflatten(0, (-1, self.repeat))
        return tensor.unflatten(0, (self.parts, -1, self.repeat // self.parts)).transpose(0, 1).flatten(1, 2)

    def _blocks(self, tensor: Tensor) -> tuple[Tensor, int]:
        """A view with the blocks on axes of their own, and the axis of the rows."""
        if self.parts > 1:
            return tensor.unflatten(self.axis, (self.parts, -1, self.repeat // self.parts)), self.axis + 1
        return tensor.unflatten(self.axis, (-1, self.repeat)), self.axis

    def weighted(self, tensor: Tensor, factors: Tensor, offset: int = 0) -> Tensor:
        """``tensor`` with each row times a factor, or each position of a row.

        Args:
            tensor: n rows, as this layout keeps them.
            factors: (n,), or (n, P) for the positions from ``offset`` on; other positions get 0. A tensor
                without such positions takes each row's largest.
            offset: first position.
        """
        rows, factors = self.first(tensor), factors.to(tensor.device)
        if factors.dim() == 2:
            end = offset + factors.shape[1]
            if factors.shape[1] > 1 and rows.dim() > 1 and rows.shape[1] >= end:
                spread = factors.new_zeros(rows.shape[:2])
                spread[:, offset:end] = factors
                factors = spread
            else:
                factors = factors.amax(1)
        rows = rows * factors.to(rows.dtype).view(*factors.shape, *[1] * (rows.dim() - factors.dim()))
        if self.parts > 1:
            rows = rows.unflatten(1, (self.parts, -1)).transpose(0, 1).flatten(0, 1)
        return (rows if self.repeat == 1 else rows.flatten(0, 1)).movedim(0, self.axis)


Layout = list[Rows | None]


def at_positions(factors: Tensor, shape: Sequence[int], offset: int) -> Tensor | None:
    """Factors of positions on the leading axes of the rows that the positions were read from.

    Args:
        factors: (n, P), of P positions a row.
        shape: of a row: (T, ...) with P positions from ``offset`` on, or with P values on its first axes (bits).
        offset: first position.

    Returns:
        (n, T) or (n, T, ...), 0 at other positions; (n,) for rows of one position; None if they do not fit.
    """
    n, positions = factors.shape
    if positions == 1:
        return factors[:, 0]
    for axes in range(1, len(shape) + 1):
        if offset == 0 and torch.Size(shape[:axes]).numel() == positions:
            return factors.view(n, *shape[:axes])
    if not shape or offset + positions > shape[0]:
        return None
    spread = factors.new_zeros(n, shape[0])
    spread[:, offset : offset + positions] = factors
    return spread


def carried_over(factors: Tensor, shape: Sequence[int], positions: bool | None = None, policy: bool = False) -> Tensor:
    """What ``at_positions`` gave for one output, for the rows of another, of this shape.

    Rows that do not begin with these positions take their largest factor.

    Args:
        factors: (n,), (n, T) or (n, T, ...).
        shape: of a row.
        positions: whether it begins with the positions; None: if they are its first axis by their number, and no other.
        policy: whether the rows are parameters of the same policy: a scale beside its mean has the same parts.
    """
    if factors.dim() == 1 or (policy and tuple(shape[: factors.dim() - 1]) == factors.shape[1:]):
        return factors
    each = factors.flatten(2).amax(2) if factors.dim() > 2 else factors
    if positions is None:
        positions = bool(shape) and shape[0] == each.shape[1] and list(shape).count(shape[0]) == 1
    return each if positions else each.amax(1)


def fill_index(rows: Tensor, batch: int) -> Tensor:
    """(batch,) index into kept rows that puts each in its place, and the first kept one where none was kept."""
    index = torch.zeros(batch, dtype=torch.long, device=rows.device)
    index[rows] = torch.arange(len(rows), device=rows.device)
    return index


def pad_to(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """``tensor`` with zeros at the end of every axis that is shorter than ``shape``."""
    missing = [after - before for before, after in zip(tensor.shape, shape, strict=True)]
    if not any(missing):
        return tensor
    return F.pad(tensor, [n for size in reversed(missing) for n in (0, size)])


def join_rows(tensors: Sequence[Tensor], axis: int) -> Tensor:
    """Rows of several batches as one; where other axes differ in size, the shorter ones get zeros at their end."""
    if len(tensors) == 1:
        return tensors[0]
    if len({t.shape[:axis] + t.shape[axis + 1 :] for t in tensors}) > 1:
        largest = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
        tensors = [pad_to(t, [*largest[:axis], t.shape[axis], *largest[axis + 1 :]]) for t in tensors]
    return torch.cat(list(tensors), axis)


def fits(layout: Layout, tensors: Sequence[Tensor], batch: int) -> bool:
    """Whether every tensor has the rows that the layout says."""
    return len(layout) == len(tensors) and all(
        rows is None or (tensor.dim() > rows.axis and tensor.shape[rows.axis] == batch * rows.repeat)
        for rows, tensor in zip(layout, tensors, strict=True)
    )


def infer_batch_size(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], batch_dim: int, lengths: Sequence[int] = ()
) -> int:
    """How many rows a call has.

    The size along ``batch_dim`` that most tensors of the call share; the first input settles a tie. ``lengths`` of
    lists, which may have an entry a row, count as such sizes.

    Raises:
        ValueError: if no tensor has an axis ``batch_dim``, or there are no rows.
    """
    sizes = [*(leaf.shape[batch_dim] for leaf in inputs if leaf.dim() > batch_dim), *lengths]
    if not sizes:
        sizes = [leaf.shape[batch_dim] for leaf in outputs if leaf.dim() > batch_dim]
    if not sizes:
        raise ValueError(
            f"gated: no tensor of this call has an axis {batch_dim} to choose rows on; "
            "name the batch axis with batch_dim=, or gate a module whose inputs are batched"
        )
    if not any(sizes):
        raise ValueError("gated: the model was called on an empty batch: there is no row to choose from")
    seen = sizes + [leaf.shape[batch_dim] for leaf in outputs if leaf.dim() > batch_dim]
    return max((size for size in sizes if size), key=lambda size: (seen.count(size), -sizes.index(size)))


def candidate_rows(tensor: Tensor, batch: int, batch_dim: int, pairs: bool = False) -> Layout:
    """Where an input may keep its rows, the likeliest first; None: it is shared by all rows."""
    each = 2 if pairs else 1
    axes = [axis for axis, size in enumerate(tensor.shape) if size == batch * each]
    axes.sort(key=lambda axis: axis != batch_dim)
    return [*(Rows(axis, each, each) for axis in axes), None]


def is_doubtful(candidates: Layout, batch_dim: int) -> bool:
    """Whether the batch size stands on two axes of an input, or on another than expected: it can be read otherwise."""
    return len(candidates) > 2 or (candidates[0] is not None and candidates[0].axis != batch_dim)


def output_rows(tensor: Tensor, batch: int, batch_dim: int, pairs: bool = False, parts: int = 1) -> Rows | None:
    """Where an output keeps its rows, also when it is flattened to (B * T, ...); None if it has none.

    ``parts`` are those of an axis that holds more than one entry of each row.
    """
    candidates = [rows for rows in candidate_rows(tensor, batch, batch_dim, pairs) if rows is not None]
    if candidates and candidates[0].axis == batch_dim:
        return candidates[0]
    if tensor.dim() and tensor.shape[0] and tensor.shape[0] % (batch * (2 if pairs else 1)) == 0:
        # (B * T, K) is likelier than (X, B), but (layers, B, H) likelier than (B * m, B, H).
        candidates.insert(0 if tensor.dim() <= 2 else 1, blocks(0, tensor.shape[0] // batch, parts))
    return candidates[0] if candidates else None


def blocks(axis: int, repeat: int, parts: int) -> Rows:
    """Rows of ``repeat`` entries in so many parts, if they can be cut so."""
    return Rows(axis, repeat, parts if repeat % parts == 0 else 1)


def rows_between(full: torch.Size, part: torch.Size, batch: int, rows: int, parts: int = 1) -> Rows | None:
    """Where a tensor keeps its rows, from its shape with ``batch`` rows and with fewer; None if that does not tell."""
    if len(full) != len(part):
        return None
    axes = [axis for axis, (a, b) in enumerate(zip(full, part, strict=True)) if a != b]
    if len(axes) != 1 or full[axes[0]] % batch or part[axes[0]] * batch != full[axes[0]] * rows:
        return None
    return blocks(axes[0], full[axes[0]] // batch, parts)


def layouts(inputs: Sequence[Tensor], batch: int, batch_dim: int, pairs: bool = False) -> Iterator[Layout]:
    """Readings of which inputs hold rows, the likeliest first.

    A shared tensor whose size happens to equal the batch size looks like rows. A reading that is wrong
    does not reproduce the screen's outputs, so the caller tries the next. Some input has its rows on ``batch_dim``:
    positions that are as many are no rows, even if a model treats them alike.
    """
    candidates = [candidate_rows(leaf, batch, batch_dim, pairs) for leaf in inputs]
    first = [options[0] for options in candidates]
    yield first
    others = [
        [other if j == i else rows for j, rows in enumerate(first)]
        for i, options in enumerate(candidates)
        for other in options[1:]
    ]
    # Tensors that are alike are read alike: the states of an LSTM.
    for shape, count in Counter(leaf.shape for leaf in inputs).items():
        alike = [i for i, leaf in enumerate(inputs) if leaf.shape == shape] if count > 1 else []
        for other in candidates[alike[0]][1:] if alike else ():
            others.append([other if j in alike else rows for j, rows in enumerate(first)])
    others += [[rows if j == i else None for j, rows in enumerate(first)] for i, where in enumerate(first) if where]
    expected = has_rows_on(first, batch_dim)
    yield from (layout for layout in others if not expected or has_rows_on(layout, batch_dim) or not any(layout))


def has_rows_on(layout: Layout, axis: int) -> bool:
    """Whether any tensor has its rows on an axis."""
    return any(rows is not None and rows.axis == axis for rows in layout)
