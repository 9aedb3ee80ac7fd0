"""Following autograd's graph: from a tensor back to the gated calls that it came from, and from a loss to its scale.

The graph's nodes are torch's own; their names and saved attributes are read here and nowhere else.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kondo_hooks import private

Node = Any  # torch.autograd.graph.Node, without a public constructor to check against
Edge = tuple[Node, int]
Kind = Literal["logp", "nll", "prob", "unknown"]


def _nodes(names: str, versions: tuple[int, ...] = (0, 1, 2)) -> set[str]:
    return {f"{name}Backward{i}" for name in names.split() for i in versions}


# Operations that act on each element; what they are applied to is broadcast from the right.
_ELEMENTWISE = _nodes(
    "Add Sub Rsub Mul Div Neg Exp Expm1 Log Log1P Log2 Log10 Pow Sqrt Rsqrt Reciprocal Clamp ClampMin ClampMax Where "
    "MaskedFill Tanh Sigmoid LogSigmoid Softplus Abs Relu Silu Gelu Elu LeakyRelu Hardtanh Erf Sin Cos Lerp Addcmul "
    "Addcdiv Atan2 Xlogy Logaddexp NanToNum Round Maximum Minimum Fmax Fmin ToCopy Clone Copy Alias"
) | {"torch::autograd::CopyBackwards"}
# Operations that mix or reorder what stands along one axis, or some.
_ALONG = _nodes(
    "LogSoftmax Softmax Logsumexp Logcumsumexp Cumsum Cumprod Sort Topk Gather IndexSelect Flip Roll Amax Amin Var Std "
    "LinalgVectorNorm"
)
_ALONG |= _nodes("Max Min", (0,)) | _nodes("Sum Mean Prod Norm", (1, 2))
# What makes of a log-prob something else, and of a value a regression's term.
_BENDS: dict[str, Literal["ratio", "regression"]] = {
    **dict.fromkeys(_nodes("Exp Expm1"), "ratio"),
    **dict.fromkeys(_nodes("Pow Abs MseLoss SmoothL1Loss HuberLoss"), "regression"),
}
# Operations on axes alone.
_SHAPE = _nodes(
    "View UnsafeView ReshapeAlias Unsqueeze Squeeze Expand Slice Select Unbind Transpose T Permute Split SplitWithSizes"
)
_JOINS = ("CatBackward0", "StackBackward0")
# What leaves a multiple of a log-prob one.
_STRAIGHT = {*_SHAPE, *_JOINS, *_nodes("Max Min", (0,)), *_nodes("Sum Mean", (1,))} | _nodes(
    "Add Sub Rsub Mul Div Neg Where MaskedFill Clamp ClampMin ClampMax Maximum Minimum Fmax Fmin ToCopy Clone Alias"
)
# Values become a jagged tensor's, and are taken out of it again.
_JAGGED = _nodes("NestedViewFromJagged NestedGetValues", (0,))
# Operations that write into their first operand at places that the graph does not tell, or not in the rows' order.
_WRITES = _nodes("IndexPut IndexCopy IndexAdd IndexFill Scatter ScatterAdd ScatterReduce MaskedScatter SliceScatter")
_WRITES |= {"torch::autograd::CopySlices"}
_FOLLOWED = {*_ELEMENTWISE, *_ALONG, *_SHAPE, *_JOINS, *_JAGGED, *_WRITES, "IndexBackward0"}
# What may reorder rows, even where the user says what a tensor is.
_REORDERS = ("Index", "Flip", "Roll", "MaskedSelect", "Sort", "Topk", "Gather", "Take", "Diagonal", "AsStrided")
_MATRICES = {"MmBackward0": (0, 1), "BmmBackward0": (0, 1), "AddmmBackward0": (1, 2), "BaddbmmBackward0": (1, 2)}
_REDUCTIONS = ("Sum", "Mean", "Nansum", "Dot", "Mv", "Mm", "Bmm")
_MOST_NODES = 4096

# Where an observation stands in the metadata of the node that it observes.
OBSERVATION = "kondo_observation"


@dataclass(frozen=True)
class Source:
    """A gated call that a tensor descends from, and how.

    Attributes:
        call: the call record.
        output: which of the call's differentiable outputs.
        kind: what the tensor holds by the operations that made it.
        row_axis: the tensor's axis that holds the call's rows.
        position_axis: the tensor's axis of the output's positions (its first axis that is not the rows'); the row axis
            if they were flattened into it; None if that cannot be told.
        offset: the output's position that the tensor's first stands for.
        repeat: entries of the row axis that each row has.
        parts: of the row axis, each of which has a share of every row's entries.
    """

    call: Any
    output: int
    kind: Kind
    row_axis: int
    position_axis: int | None
    offset: int
    repeat: int = 1
    parts: int = 1

    @property
    def entries(self) -> int:
        """How many entries of the row axis the call's rows take."""
        return int(self.call.batch) * self.repeat

    def rows(self, entries: Tensor) -> Tensor:
        """(B, P) of the call's own entries (B * repeat, ...), which stand on axis 0."""
        if self.parts > 1:
            entries = entries.unflatten(0, (self.parts, self.call.batch, self.repeat // self.parts)).transpose(0, 1)
        return entries.reshape(self.call.batch, -1)


_Sources = list[Source] | None
"""Of a tensor: none if it descends from no call, None if its rows cannot be followed."""


def find_sources(tensor: Tensor, trust: bool = False) -> list[Source] | None:
    """The gated calls that ``tensor``'s rows come from, in the order of the rows; None if that cannot be followed.

    All of them have the same row axis, and their entries fill it. ``trust`` accepts operations that are not known to
    keep the rows in order, except those that reorder.
    """
    node: Node = tensor.grad_fn
    if node is None:
        return None
    parent, nr = node.next_functions[0] if node.name() == "LogSoftmaxBackward0" else (None, 0)
    if (call := getattr(parent, "kondo_call", None)) is not None:  # by far the most frequent way
        placed = _place_output(call, nr)
        moved = placed and _along(node, node.name(), edge_shape((parent, nr)), tuple(tensor.shape), placed)
        sources: _Sources = [replace(moved, kind="logp")] if moved else None
    else:
        sources = _Follower(trust).follow((node, tensor.output_nr))
    if not sources or sum(source.entries for source in sources) != tensor.shape[sources[0].row_axis]:
        return None
    return sources


def is_log_softmax(tensor: Tensor) -> bool:
    """Whether a tensor is the log-softmax over the last axis of a call's own output, or of some of its positions."""
    node: Node = tensor.grad_fn
    if node.name() != "LogSoftmaxBackward0" or _signed(node._saved_dim) % tensor.dim() != tensor.dim() - 1:
        return False
    while (node := node.next_functions[0][0]) is not None:
        if hasattr(node, "kondo_call"):
            return True
        if node.name() == "SliceBackward0":
            positions = node._saved_step == 1 and _signed(node._saved_dim) == 1 and tensor.dim() > 2
            if not (positions or _takes_all(node)):
                return False
        elif node.name() not in ("ToCopyBackward0", "AliasBackward0"):
            return False
    return False


def _takes_all(node: Node) -> bool:
    """Whether a slice takes all of its axis: before torch 2.11 ``t[:, 1:]`` is two slices."""
    length = node._saved_self_sym_sizes[_signed(node._saved_dim)]
    return bool(node._saved_step == 1 and node._saved_start == 0 and length <= node._saved_end)


def sources_of_result(node: Node) -> list[Source] | None:
    """The calls that the rows of an operation's result come from, as :func:`find_sources` finds them."""
    if len(private.result_shapes(node)) != 1 or node.name() not in {*_ELEMENTWISE, *_MATRICES, *_JOINS}:
        return None
    sources = _Follower(also=_MATRICES).follow((node, 0))
    if not sources or sum(source.entries for source in sources) != edge_shape((node, 0))[sources[0].row_axis]:
        return None
    return sources


class _Follower:
    """Follows calls' rows to one tensor, through each node of its graph once."""

    def __init__(self, trust: bool = False, also: Collection[str] = ()):
        self._trust = trust
        self._followed = {*_FOLLOWED, *also}
        self._found: dict[Edge, _Sources] = {}

    def follow(self, end: Edge) -> _Sources:
        stack = [end]
        while stack:
            edge = stack[-1]
            behind = [] if edge in self._found else self._looked_at(edge[0])
            missing = [parent for parent in behind if parent not in self._found]
            if len(self._found) + len(stack) > _MOST_NODES:
                return None
            if missing:
                stack += missing
                continue
            stack.pop()
            if edge not in self._found:
                self._found[edge] = self._find(edge, behind)
        return self._found[end]

    def _looked_at(self, node: Node) -> list[Edge]:
        if hasattr(node, "kondo_call") or not (self._trust or node.name() in self._followed):
            return []
        return [(parent, nr) for parent, nr in node.next_functions if parent is not None]

    def _find(self, edge: Edge, behind: list[Edge]) -> _Sources:
        node, name = edge[0], edge[0].name()
        if (call := getattr(node, "kondo_call", None)) is not None:
            source = _place_output(call, edge[1])
            return None if source is None else [source]
        if not behind:
            return None if leads_to_call(node) else []
        if name in _JOINS:
            return self._find_joined(edge)
        slots = [(i, parent) for i, parent in enumerate(node.next_functions) if parent[0] is not None]
        moved = {slot: self._through(edge, slot, parent) for slot, parent in slots}
        main = next((slot for slot, sources in moved.items() if sources), None)
        if main is None:
            return None if None in moved.values() else []
        found = moved.pop(main)
        assert found is not None
        axis = found[0].row_axis - len(edge_shape(edge))
        for slot, sources in moved.items():
            if sources and (sources[0].row_axis, sources[0].repeat) != (found[0].row_axis, found[0].repeat):
                return None  # rows of the one stand across those of the other
            shape = edge_shape(node.next_functions[slot])
            if sources is None and len(shape) >= -axis and shape[axis] > 1:
                return None  # it brings rows of its own
        if name in _WRITES and any(sources != [] for sources in moved.values()):
            return None
        return [replace(source, kind=_kind(node, name, source.kind)) for source in found]

    def _find_joined(self, edge: Edge) -> _Sources:
        """Of a concatenation: along the rows the parts' calls follow each other; along another axis rows stay."""
        node, stacked = edge[0], edge[0].name() == "StackBackward0"
        dim = _signed(node._saved_dim) % len(edge_shape(edge))
        parts = [[] if parent is None else self._found[parent, nr] for parent, nr in node.next_functions]
        placed = [part for part in parts if part]
        if not placed:
            return None if None in parts else []
        if not stacked and (pieces := _pieces_of_a_row(node, parts, dim)) is not None:
            return [pieces]
        first = placed[0][0]
        if any(part is None or (part[0].row_axis, part[0].repeat) != (first.row_axis, first.repeat) for part in placed):
            return None
        if None in parts:
            return None
        if not stacked and dim == first.row_axis:
            every = [source for part in placed for source in part]
            return every if len(placed) == len(parts) and not any(source.parts > 1 for source in every[1:]) else None
        calls = [[(source.call, source.parts) for source in part] for part in placed]
        if any(call != calls[0] for call in calls):
            return None
        if stacked:
            axis = first.row_axis + (dim <= first.row_axis)
            return [replace(source, row_axis=axis, position_axis=None) for source in placed[0]]
        in_order = len(placed) == len(parts) and dim == first.position_axis and len(placed[0]) == 1
        following = first.offset
        for part, edge_ in zip(placed, node.next_functions, strict=False):
            in_order = in_order and (part[0].position_axis, part[0].offset) == (dim, following)
            following += edge_shape(edge_)[dim] if in_order else 0
        if in_order or first.position_axis not in (dim, first.row_axis):
            return placed[0]
        return [replace(source, position_axis=None) for source in placed[0]]

    def _through(self, edge: Edge, slot: int, parent: Edge) -> _Sources:
        """Where the rows of one operand stand in an operation's result."""
        sources = self._found[parent]
        if not sources:
            return sources
        node, name = edge[0], edge[0].name()
        before, after = edge_shape(parent), edge_shape(edge)
        row = sources[0].row_axis
        size = before[row]
        if name in _WRITES:
            return sources if slot == 0 else None
        if name in _JAGGED:
            return sources
        if name in _SHAPE:
            return _all([_reshaped(edge, name, before, after, source) for source in sources])
        if name in _ELEMENTWISE:
            new = row + len(after) - len(before)
            shift = len(after) - len(before)
            return [_shifted(source, shift) for source in sources] if after[new] == size else None
        if name in _ALONG:
            return _all([_along(node, name, before, after, source) for source in sources])
        if name == "IndexBackward0":
            return _indexed(node, after, sources)
        if name in _MATRICES:
            left, right = _MATRICES[name]
            kept = {left: len(after) - 2, right: len(after) - 1}.get(slot)
            batched = len(after) == 3 and row == 0
            if row != kept and not batched:
                return None
            return [s if s.position_axis in (row, kept) else replace(s, position_axis=None) for s in sources]
        if name.startswith(_REORDERS):
            return None
        # Not known: taken to leave the rows where they are.
        if len(after) <= row or after[row] != size or (row != 0 and before != after):
            return None
        if before == after:
            return sources
        return [s if s.position_axis == row else replace(s, position_axis=None) for s in sources]


def _pieces_of_a_row(node: Node, parts: Sequence[_Sources], dim: int) -> Source | None:
    """A call's only row put together of pieces of its positions, one after another; None if it is something else."""
    whole: Source | None = None
    for part, edge in zip(parts, node.next_functions, strict=True):
        if part is None or len(part) != 1 or part[0].call.batch != 1 or part[0].parts > 1:
            return None
        source, shape = part[0], edge_shape(edge)
        axis = source.row_axis if source.repeat > 1 else source.position_axis
        if axis != dim and (math.prod(shape) if axis is None else shape[axis]) != 1:
            return None
        if whole is None:
            whole = replace(source, row_axis=dim, position_axis=dim, repeat=shape[dim])
        elif (source.call, source.output, source.offset) != (whole.call, whole.output, whole.offset + whole.repeat):
            return None
        else:
            whole = replace(whole, repeat=whole.repeat + shape[dim])
    return whole


def _all(sources: Sequence[Source | None]) -> _Sources:
    found = [source for source in sources if source is not None]
    return found if len(found) == len(sources) else None


def edge_shape(edge: Edge) -> tuple[int, ...]:
    """Of the tensor that an edge stands for."""
    return private.result_shape(*edge)


def _signed(value: int) -> int:
    """Autograd nodes hand out negative numbers as unsigned 64-bit ones."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _dims(node: Node, rank: int) -> set[int]:
    """The axes that an operation goes along; all of them if it names none."""
    dims = getattr(node, "_saved_dims", None)
    if dims is None:
        dims = node._saved_dim
    dims = dims if isinstance(dims, tuple) else (dims,)
    return {_signed(dim) % rank for dim in dims} or set(range(rank))


def _place_output(call: Any, output: int) -> Source | None:
    """Where rows and positions of a call's output stand."""
    where = call.rows[output] if output < len(call.outputs) else None  # none once it was released
    if where is None:
        return None
    rank = call.outputs[output].dim()
    positions: int | None = where.axis
    if where.repeat == 1:
        positions = next((axis for axis in range(rank) if axis != where.axis), None)
    return Source(call, output, "unknown", where.axis, positions, 0, where.repeat, where.parts)


def _shifted(source: Source, by: int) -> Source:
    positions = source.position_axis
    return replace(source, row_axis=source.row_axis + by, position_axis=None if positions is None else positions + by)


def _along(node: Node, name: str, before: tuple[int, ...], after: tuple[int, ...], source: Source) -> Source | None:
    """After an operation along some axes, which may drop them."""
    dims, row, positions = _dims(node, len(before)), source.row_axis, source.position_axis
    if row in dims:
        return None
    if positions in dims and not ("Softmax" in name and len(after) == len(before)):
        positions = None
    if len(after) == len(before):
        # Gather goes no further than its index on the other axes.
        return replace(source, position_axis=positions) if after[row] == before[row] else None
    return replace(source, row_axis=_without(dims, row), position_axis=_without(dims, positions))


def _without(dims: set[int], axis: int | None) -> Any:
    return None if axis is None else axis - sum(dim < axis for dim in dims)


def _indexed(node: Node, after: tuple[int, ...], sources: list[Source]) -> _Sources:
    """After ``t[index]``: rows on axis 0, which are left alone or picked one after the other."""
    indices = node._saved_indices
    used = [axis for axis, index in enumerate(indices) if index is not None]
    if sources[0].row_axis != 0 or used != list(range(used[0], used[-1] + 1)):
        return None
    rows = indices[0]
    if rows is not None:
        size = node._saved_self_sym_sizes[0]
        plain = rows.dtype == torch.int64 and rows.shape == (size,) and after[0] == size
        if not plain or any(indices[axis].dim() > 1 or indices[axis].dtype == torch.bool for axis in used):
            return None
        if not torch.equal(rows, torch.arange(size, device=rows.device)):
            return None
    return [replace(source, position_axis=None) for source in sources]


def _reshaped(edge: Edge, name: str, before: tuple[int, ...], after: tuple[int, ...], source: Source) -> Source | None:
    """After an operation on axes alone."""
    node, row, positions = edge[0], source.row_axis, source.position_axis
    if name.startswith(("View", "UnsafeView", "ReshapeAlias")):
        return _viewed(before, after, source)
    if name.startswith("Expand"):
        moved = _shifted(source, len(after) - len(before))
        return moved if after[moved.row_axis] == before[row] else None
    if name.startswith("Unsqueeze"):
        dim = _signed(node._saved_dim) % len(after)
        positions = None if positions is None else positions + (dim <= positions)
        return replace(source, row_axis=row + (dim <= row), position_axis=positions)
    if name.startswith(("Transpose", "TBackward", "Permute")):
        order = list(range(len(before)))
        if name.startswith("Permute"):
            order = [_signed(dim) % len(before) for dim in node._saved_dims]
        elif len(before) > 1:
            a, b = (0, 1) if name.startswith("TB") else (_signed(d) % len(before) for d in _transposed(node))
            order[a], order[b] = order[b], order[a]
        return replace(
            source, row_axis=order.index(row), position_axis=None if positions is None else order.index(positions)
        )
    if name.startswith("Squeeze"):
        dims = set(range(len(before))) if name == "SqueezeBackward0" else _dims(node, len(before))
        gone = {dim for dim in dims if before[dim] == 1}
        if row in gone:
            return _viewed(before, after, source)  # a single row: its positions are what is left of the rows
        positions = row if positions in gone and source.repeat == 1 else positions
        return replace(source, row_axis=_without(gone, row), position_axis=_without(gone, positions))
    dim = _signed(node._saved_dim) % len(before)
    if name.startswith(("Select", "Unbind")):
        if dim == row:
            return _viewed(before, after, source) if before[row] == 1 else None
        index = _signed(node._saved_index) % before[dim] if name.startswith("Select") else edge[1]
        if dim == positions:  # one position is left, and it goes with the rows
            source, positions = replace(source, offset=source.offset + index), row
        return replace(source, row_axis=_without({dim}, row), position_axis=_without({dim}, positions))
    start = _start(node, name, edge[1], before[dim])
    if dim == row:
        if after[row] == before[row]:
            return source
        if positions == row and source.call.batch == 1 and source.parts == 1 and start is not None:
            return replace(source, offset=source.offset + start, repeat=after[row])
        half = source.parts == 2 and start is not None and 2 * after[row] == before[row] and start % after[row] == 0
        return replace(source, parts=1, repeat=source.repeat // 2) if half else None
    if dim == positions:
        return replace(source, position_axis=None) if start is None else replace(source, offset=source.offset + start)
    return source


def _transposed(node: Node) -> tuple[int, int]:
    return node._saved_dim0, node._saved_dim1


def _start(node: Node, name: str, output: int, size: int) -> int | None:
    """Where a slice or a piece of a split starts on its axis; None if it leaves entries out in between."""
    if name.startswith("SplitWithSizes"):
        return sum(node._saved_split_sizes[:output])
    if name.startswith("Split"):
        return int(node._saved_split_size) * output
    if node._saved_step != 1:
        return None
    start = _signed(node._saved_start)
    return min(start + size if start < 0 else start, size)


def _viewed(before: tuple[int, ...], after: tuple[int, ...], source: Source) -> Source | None:
    """After a reshape: the axes that hold the rows before and after it are found by their sizes."""
    if math.prod(before) == 0:
        return None
    row, positions = source.row_axis, source.position_axis
    groups = _matched(before, after)
    old, new = next(group for group in groups if row in group[0])
    if not new or any(before[axis] != 1 for axis in old if axis < row):
        return None
    axis = next((axis for axis in new if after[axis] != 1), new[0])
    # The rows come first in their group, so they are the first axis after it, with less or more to each.
    total = before[row] // source.repeat
    if after[axis] % total:
        return None
    repeat = after[axis] // total
    if repeat % source.parts:
        return None
    found: int | None = None
    if positions == row:
        inner = next((a for a in new if a > axis and after[a] != 1), None)
        if repeat == source.repeat:
            found = axis
        elif repeat == 1 and inner is not None and after[inner] == source.repeat:
            found = inner
    elif positions is not None:
        if positions in old:
            flat = before[row] * before[positions]
            if after[axis] == flat and source.repeat == 1:
                found = axis
            elif repeat == source.repeat:
                found = next((a for a in new if a > axis and after[a] != 1), None)
                found = found if found is not None and after[found] == before[positions] else None
        else:
            group = next(group for group in groups if positions in group[0])
            found = next((a for a in group[1] if after[a] == before[positions]), None)
    return replace(source, row_axis=axis, position_axis=found, repeat=repeat)


def _matched(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Axes before and after a reshape that hold the same elements, as the smallest groups."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old: list[int] = []
        new: list[int] = []
        a = b = 1
        while True:
            pairs = bool(old) and not new and a == b and j < len(after)  # axes of one entry, each with its own
            if i < len(before) and not pairs and (a <= b or j == len(after)):
                a *= before[i]
                old.append(i)
                i += 1
            elif j < len(after):
                b *= after[j]
                new.append(j)
                j += 1
            if a == b and (new or j == len(after)):
                break
        groups.append((old, new))
    return groups


def leads_to_call(node: Node) -> bool:
    """Whether a node's graph goes down to a gated call."""
    stack, seen = [node], {node}
    while stack:
        node = stack.pop()
        if hasattr(node, "kondo_call"):
            return True
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return False


def _kind(node: Node, name: str, before: Kind = "unknown") -> Kind:
    """What the result of an operation holds, where its operand held ``before``."""
    if name in ("LogSoftmaxBackward0", "LogBackward0", "LogSigmoidBackward0"):
        return "logp"
    parents = [parent.name() for parent, _ in node.next_functions if parent is not None]
    if name == "SubBackward0" and "LogsumexpBackward0" in parents:
        return "logp"
    if name in ("SoftmaxBackward0", "ExpBackward0"):
        return "prob"
    if name == "NegBackward0":
        return {"logp": "nll", "nll": "logp"}.get(before, before)  # type: ignore[return-value]
    return before


def selects_log_prob(output: Tensor) -> bool:
    """Whether a model's output, run with a graph, was picked from log-probs: an nll, or a gather of a log-softmax."""
    stack = [(output.grad_fn, False, 0)]
    while stack:
        node, picked, depth = stack.pop()
        if node is None or depth > 32:
            continue
        name = node.name()
        if name.startswith(("NllLoss", "BinaryCrossEntropy")):
            return True
        parents = [parent for parent, _ in node.next_functions]
        if picked and node is not None and _kind(node, name) == "logp":
            return True
        if name == "SubBackward0" and {"GatherBackward0", "LogsumexpBackward0"} <= _origins(parents):
            return True
        picked = picked or name in ("GatherBackward0", "IndexBackward0")
        if name in _ELEMENTWISE or name in _SHAPE or name in ("GatherBackward0", "IndexBackward0"):
            stack.extend((parent, picked, depth + 1) for parent in parents)
    return False


Bend = Literal["ratio", "regression"]


def find_bend(output: Tensor, log_probs: Collection[Node]) -> Bend | None:
    """What the terms of a model's own loss, run with a graph, are, if they are multiples of nothing like a log-prob.

    A ratio's exponential or a regression's square stands on every way down. Of a way that ends elsewhere before, at a
    log-softmax, a fused loss, or one of these nodes of log-probs, nobody knows better: then None.
    """
    stack, seen = [output.grad_fn], {output.grad_fn}
    bends: set[Bend] = set()
    while stack and len(seen) < _MOST_NODES:
        node = stack.pop()
        if node is None or hasattr(node, "variable"):
            continue
        name = node.name()
        if node in log_probs or name not in {*_BENDS, *_STRAIGHT}:
            return None
        if name in _BENDS:
            bends.add(_BENDS[name])
            continue
        parents = [parent for parent, _ in node.next_functions if parent not in seen]
        stack += parents
        seen.update(parents)
    return "ratio" if "ratio" in bends else "regression" if bends else None


def _origins(nodes: list[Node]) -> set[str]:
    """Names of nodes, seen through operations on shapes."""
    names = set()
    for node in nodes:
        while node is not None and node.name() in _SHAPE:
            node = node.next_functions[0][0]
        if node is not None:
            names.add(node.name())
    return names


def reaches(loss: Any) -> tuple[bool, list[Tensor]]:
    """Whether a loss comes from gated calls, and the other leaves that its graph leads to."""
    calls, leaves, seen = False, [], set()
    stack = [getattr(loss, "grad_fn", None)]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "kondo_call", None) is not None:
            calls = True
        elif (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
        else:
            stack.extend(parent for parent, _ in node.next_functions)
    return calls, leaves


def silence(outputs: Iterable[Tensor], inputs: Iterable[Tensor] = ()) -> list[Any]:
    """Make whatever these outputs send to a leaf, or to ``inputs``, exactly zero; returns the hooks, to be removed.

    A gradient of zero at an output is not enough: times a NaN or an infinity inside the model it is NaN. What other
    outputs send to the same leaves is left alone.
    """
    ends = {leaf.grad_fn for leaf in inputs}
    handles, seen = [], set(ends)
    stack = [output.grad_fn for output in outputs]
    while stack:
        node = stack.pop()
        if node is None or node in seen or hasattr(node, "variable"):
            continue
        seen.add(node)
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if any(parent in ends or hasattr(parent, "variable") for parent in parents):
            handles.append(node.register_hook(_zeros))
        stack.extend(parents)
    return handles


def _zeros(sent: tuple[Tensor | None, ...], _received: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if grad is None else torch.zeros_like(grad) for grad in sent)


class Probe:
    """The gradient that a backward brings to a node whose result is a scalar."""

    def __init__(self, node: Node):
        self.grad: Tensor | None = None
        self._hook = node.register_prehook(self._note)

    def _note(self, grads: tuple[Tensor | None, ...]) -> None:
        self.grad = None if grads[0] is None else grads[0].detach()

    def remove(self) -> None:
        """Take the hook off."""
        self._hook.remove()


@dataclass(frozen=True)
class Path:
    """How a loss reaches log-probs, or a call's output: by which addition and which reduction.

    Attributes:
        addition: at the first addition on the way; None if there is none.
        reduction: at the first sum or mean over samples; None if there is none.
        share: of each term in the addition: 1/n if it is a mean of n.
        each: of each sample in the reduction: 1/N for a mean over N, 1 for a sum.
    """

    addition: Probe | None
    reduction: Probe | None
    share: float = 1.0
    each: float | Tensor = 1.0


@dataclass(frozen=True)
class Scale:
    """The scalar factors between a loss and its samples.

    Attributes:
        above: the factors above the first addition on the way, all of them if there is none.
        below: the factors below it, down to the first reduction.
        reduction: 1/N for a mean over N, 1 for a sum.
    """

    above: float
    below: float
    reduction: float

    @property
    def product(self) -> float:
        """All of it."""
        return self.above * self.below * self.reduction


def read_scales(paths: Sequence[Sequence[Path]]) -> list[list[Scale]]:
    """The scales along each of the paths that the backward took, after it; one synchronisation for all of them."""
    probes = {id(p): p for each in paths for path in each for p in (path.addition, path.reduction) if p is not None}
    reached = {key: probe.grad for key, probe in probes.items() if probe.grad is not None}
    # How many labels a mean counts is on the device, too.
    reached |= {id(path): path.each for one in paths for path in one if isinstance(path.each, Tensor)}
    values: dict[int, float] = {}
    if reached:
        device = next(iter(reached.values())).device
        each = [grad.detach().reshape(-1)[:1].to(device, torch.float64) for grad in reached.values()]
        values = dict(zip(reached, torch.cat(each).abs().tolist(), strict=True))
    return [[scale for path in each if (scale := _scale(path, values)) is not None] for each in paths]


def scale_along(path: Path, assumed: float) -> float | Tensor:
    """The scale along the only path of a backward, without waiting for it; ``assumed`` if that went another way.

    A loss times zero, or beyond the range of its type, has no scale: it gives the smallest number of that type above
    zero, or the largest.
    """
    probes = [probe for probe in (path.addition, path.reduction) if probe is not None]
    if any(probe.grad is None for probe in probes):
        return assumed
    if not probes:
        return 1.0
    grad = probes[-1].grad
    assert grad is not None
    scale = grad.detach().reshape(-1)[0].abs()
    scale = scale if scale.dtype == torch.float64 else scale.float()
    factor = path.each if path.reduction is not None else path.share
    if isinstance(factor, Tensor) or factor != 1:
        scale = scale * factor
    return scale.clamp(torch.finfo(scale.dtype).tiny, torch.finfo(scale.dtype).max)


def _scale(path: Path, values: dict[int, float]) -> Scale | None:
    """None if the backward sent nothing along the path."""
    above = 1.0 if path.addition is None else values.get(id(path.addition), 0.0) * path.share
    if path.reduction is None:
        return Scale(above, 1.0, 1.0) if 0 < above < math.inf else None
    whole = values.get(id(path.reduction), 0.0)
    if path.addition is None:
        above = whole
    if not (0 < whole < math.inf and 0 < above < math.inf):
        return None
    return Scale(above, whole / above, values[id(path)] if isinstance(path.each, Tensor) else path.each)


def probe_scales(roots: Sequence[Node]) -> tuple[list[Probe], list[Tensor]]:
    """Have the backward that is about to start tell the loss's own scale.

    The scale is the product of the scalar factors from the loss down to its first sum or mean over samples: ``1/N``
    for a mean, times a GradScaler's scale, over the accumulation steps. The factors are what the backward itself sends
    to that sum or mean, so they are right for any order, sign and nesting of terms. Each observation and gated call
    gets a :class:`Path` for each way that the loss takes to it.

    Args:
        roots: the losses' ``grad_fn``.

    Returns:
        The probes, to be removed after the backward, and the leaves that the losses reach past gated calls.
    """
    probes: dict[Node, Probe] = {}

    def probe(node: Node) -> Probe:
        if node not in probes:
            probes[node] = Probe(node)
        return probes[node]

    met: set[Any] = set()

    def note(target: Target, path: Path) -> None:
        if target not in met:
            met.add(target)
            _paths(target).clear()
        _paths(target).append(path)

    below = _Targets()
    seen: set[Node] = set()
    uses, observed = below.uses, below.observed
    # A node, the first addition above it with the share of its terms, and the last sum of scalars put side by side.
    stack: list[tuple[Node, _Sum, _Sum]] = [(root, None, None) for root in roots]

    def unreduced(target: Target, top: _Sum, joined: _Sum) -> None:
        """Note a target with no sum over samples above it, but for one of scalars that were put side by side."""
        addition, share = (None, 1.0) if top is None else (probe(top[0]), top[1])
        reduction, each = (None, 1.0) if joined is None else (probe(joined[0]), joined[1])
        note(target, Path(addition, reduction, share, each))

    while stack:
        node, top, joined = stack.pop()
        if node in seen or is_gated(node):
            continue
        seen.add(node)
        name, parents = node.name(), [parent for parent in node.next_functions if parent[0] is not None]
        share = 1.0 if top is None else top[1]
        if (observation := node.metadata.get(OBSERVATION)) is not None:
            observed.append((node, observation))
            if observation.own_scale is not None:
                addition = None if top is None else probe(top[0])
                note(observation, Path(addition, probe(node), share, observation.own_scale))
                continue
            # A scalar factor on a single log-prob is its advantage.
            unreduced(observation, top, joined)
        is_scalar = math.prod(edge_shape((node, 0))) == 1
        if is_scalar and (each := _each_of(name, node, parents)) is not None:
            if isinstance(each, float) and (terms := _terms(parents)) is not None:
                stack += [(term, top or (node, each), (node, each)) for term, _ in terms]
                continue
            addition = None if top is None else probe(top[0])
            for target in below.of(node):
                own = getattr(target, "own_scale", None)
                note(target, Path(addition, probe(node), share, each if own is None else each * own))
            continue
        if name in ("AddBackward0", "SubBackward0") and is_scalar and top is None:
            top = (node, 1.0)
        uses.update(parents)
        for parent, nr in parents:
            if top is not None and (call := getattr(parent, "kondo_call", None)) is not None:
                unreduced((call, nr), top, joined)
            stack.append((parent, top, joined))
    for node, observation in observed:
        observation.alone = observation.picked is not None and _is_sole_use(node, uses)
    leaves = [node.variable for node in {*seen, *below.seen} if hasattr(node, "variable")]
    return list(probes.values()), leaves


def _is_sole_use(node: Node, uses: Counter[Edge]) -> bool:
    """Whether all that a loss takes from a call's output goes through this operation, and nowhere else on the way."""
    while (edge := node.next_functions[0])[0] is not None:
        if uses[edge] != 1:
            return False
        if hasattr(edge[0], "kondo_call"):
            return True
        node = edge[0]
    return False


def is_gated(node: Node) -> bool:
    """Whether the loss's graph ends here: at a gated call, or at rows that ran first."""
    return hasattr(node, "kondo_call") or hasattr(node, "kondo_rows")


_Sum = tuple[Node, float] | None
"""A sum or mean, and the share of each of its terms."""

Target = Any
"""An observation, or a call and the number of one of its outputs."""


def _paths(target: Target) -> list[Path]:
    if isinstance(target, tuple):
        call, output = target
        return call.loss_paths.setdefault(output, [])
    return target.paths


class _Targets:
    """The observations and the calls' outputs below a node, each node looked at once.

    Attributes:
        uses: how many of the nodes use each result.
        observed: the nodes with an observation.
    """

    def __init__(self) -> None:
        self._below: dict[Node, frozenset[Target]] = {}
        self.uses: Counter[Edge] = Counter()
        self.observed: list[tuple[Node, Any]] = []

    @property
    def seen(self) -> Iterable[Node]:
        """The nodes that were looked at."""
        return self._below

    def of(self, end: Node) -> frozenset[Target]:
        """What is below ``end``."""
        stack = [end]
        while stack:
            node = stack[-1]
            parents = [parent for parent in node.next_functions if parent[0] is not None]
            missing = [p for p, _ in parents if p not in self._below and not is_gated(p)]
            if node not in self._below and missing:
                stack += missing
                continue
            stack.pop()
            if node not in self._below:
                self._below[node] = self._join(node, parents)
        return self._below[end]

    def _join(self, node: Node, parents: list[Edge]) -> frozenset[Target]:
        found: frozenset[Target] = frozenset()
        self.uses.update(parents)
        for parent, nr in parents:
            call = getattr(parent, "kondo_call", None)
            more = self._below.get(parent, frozenset()) if call is None else frozenset([(call, nr)])
            found = found if more <= found else more if found <= more else found | more
        if (observation := node.metadata.get(OBSERVATION)) is None:
            return found
        self.observed.append((node, observation))
        return found | {observation}


def _each_of(name: str, node: Node, parents: list[Edge]) -> float | Tensor | None:
    """The share of each value in a sum, mean or product over samples; None if the node is none of these."""
    if name.startswith(("NllLoss", "BinaryCrossEntropy")):
        mean = node._saved_reduction == 1
        counted = getattr(node, "_saved_total_weight", None)
        return 1.0 if not mean else 1 / node._saved_self.numel() if counted is None else 1 / counted
    if not name.startswith(_REDUCTIONS):
        return None
    if (sizes := getattr(node, "_saved_self_sym_sizes", None)) is not None:
        reduced = math.prod(sizes) if len(sizes) else None
    else:
        reduced = max((math.prod(edge_shape(parent)) for parent in parents if edge_shape(parent)), default=None)
    return None if reduced is None else 1 / reduced if "Mean" in name else 1.0


def _terms(parents: list[Edge]) -> list[Edge] | None:
    """The scalars that were put side by side, and at most weighted, to be summed; None if it is no sum of these."""
    while len(parents) == 1:
        node, name = parents[0][0], parents[0][0].name()
        if OBSERVATION in node.metadata or not (name in _JOINS or name in _ELEMENTWISE):
            return None
        parents = [parent for parent in node.next_functions if parent[0] is not None]
        if name in _JOINS:
            return parents if all(math.prod(edge_shape(parent)) == 1 for parent in parents) else None
    return None
