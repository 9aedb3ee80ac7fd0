"""Following autograd's graph: from a tensor back to the gated calls that it came from, and from a loss to its scale.

The graph's nodes are torch's own; their names and saved attributes are read here and nowhere else.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Node = Any  # torch.autograd.graph.Node, without a public constructor to check against
Edge = tuple[Node, int]
Kind = Literal["logp", "prob", "unknown"]

# Operations that act on each element, or along one axis, or on the shape: followed back, their axes minded.
_ELEMENTWISE = {
    f"{name}Backward{i}"
    for i in (0, 1, 2)
    for name in (
        "Add Sub Mul Div Neg Exp Log Log1P Pow Clamp ClampMin ClampMax Where MaskedFill IndexPut Tanh Sigmoid "
        "LogSigmoid LogSoftmax Softmax Softplus Abs Relu Maximum Minimum ToCopy Clone Copy Alias"
    ).split()
} | {"torch::autograd::CopySlices"}
_SHAPE = {
    f"{name}Backward{i}"
    for i in (0, 1)
    for name in (
        "View UnsafeView ReshapeAlias Unsqueeze Squeeze Expand Slice Select Transpose T Permute Split SplitWithSizes"
    ).split()
}
# What may reorder rows, even where the user says what a tensor is.
_REORDERS = ("IndexBackward", "IndexSelect", "Flip", "Roll", "MaskedSelect", "Sort", "Topk", "TBackward", "Gather")
_REDUCTIONS = ("Sum", "Mean", "Nansum", "Dot", "Mv", "Mm", "Bmm")
_DEPTH = 64

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
    """

    call: Any
    output: int
    kind: Kind
    row_axis: int
    position_axis: int | None
    offset: int


def find_sources(tensor: Tensor, trust: bool = False) -> list[Source] | None:
    """The gated calls that ``tensor``'s rows come from, in row order; None if that cannot be followed.

    ``trust`` accepts operations that are not known to keep the rows in order, except those that reorder.
    """
    if tensor.grad_fn is None:
        return None
    return _follow((tensor.grad_fn, tensor.output_nr), "unknown", (), trust, _DEPTH, set())


def _follow(edge: Edge, kind: Kind, shaped: tuple[Node, ...], trust: bool, depth: int, dead: set[Node]) -> Any:
    """``shaped``: the operations on axes passed so far, the last one first."""
    start = edge[0]
    while depth:
        depth -= 1
        node, output = edge
        if (call := getattr(node, "kondo_call", None)) is not None:
            source = _place(call, output, kind, shaped)
            return None if source is None else [source]
        name = node.name()
        parents = [(parent, nr) for parent, nr in node.next_functions if parent is not None]
        if name in ("CatBackward0", "StackBackward0"):
            return _follow_parts(node, kind, shaped, trust, depth, dead)
        known = name in _ELEMENTWISE or name in _SHAPE
        if not parents or node in dead or not (known or trust) or (not known and not _in_order(node, name)):
            dead.add(start)
            return None
        if kind == "unknown":
            kind = _kind(name, [parent for parent, _ in parents])
        if name in _SHAPE or (trust and name in ("SumBackward1", "MeanBackward1")):
            shaped = (node, *shaped)
        if len(parents) == 1:
            edge = parents[0]
            continue
        for parent in parents:
            if (found := _follow(parent, kind, shaped, trust, depth, dead)) is not None:
                return found
        break
    dead.add(start)
    return None


def _follow_parts(node: Node, kind: Kind, shaped: tuple[Node, ...], trust: bool, depth: int, dead: set[Node]) -> Any:
    """Through a concatenation of rows; each part keeps them on its first axis."""
    if _axis(node, node._saved_dim) != 0 or shaped:
        return None
    sources: list[Source] = []
    for parent, nr in node.next_functions:
        found = None if parent is None else _follow((parent, nr), kind, (), trust, depth, dead)
        if found is None or any(source.row_axis != 0 for source in found):
            return None
        sources += found
    return sources


def _in_order(node: Node, name: str) -> bool:
    """Whether an operation that the user vouches for leaves row i in row i."""
    if name == "IndexBackward0":
        rows = node._saved_indices[0]
        return rows is None or (
            rows.dtype == torch.int64
            and rows.dim() == 1
            and bool((rows == torch.arange(len(rows), device=rows.device)).all())
        )
    if name == "GatherBackward0":
        return _axis(node, node._saved_dim) != 0
    return not name.startswith(_REORDERS)


def _signed(value: int) -> int:
    """Autograd nodes hand out negative numbers as unsigned 64-bit ones."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _rank(node: Node) -> int:
    return len(node._input_metadata[0].shape)


def _axis(node: Node, dim: int) -> int:
    return _signed(dim) % max(_rank(node), 1)


def _place(call: Any, output: int, kind: Kind, shaped: tuple[Node, ...]) -> Source | None:
    """Where rows and positions of a call's output stand after the operations on its axes."""
    where = call.rows[output]
    if where is None:
        return None
    rank = call.outputs[output].dim()
    rows: int | None = where.axis
    if where.repeat > 1:
        positions: int | None = where.axis
    else:
        positions = next((axis for axis in range(rank) if axis != where.axis), None)
    offset = 0
    for node in shaped:
        name = node.name()
        if name.startswith(("View", "UnsafeView", "ReshapeAlias")):
            before, after = tuple(node._saved_self_sym_sizes), tuple(node._input_metadata[0].shape)
            rows, positions = _through_view(before, after, rows, positions)
        elif positions == rows:
            rows = positions = _moved(node, name, rows)
        else:
            rows = _moved(node, name, rows)
            if positions is None or _cut_axis(node, name) != positions:
                positions = _moved(node, name, positions)
            elif name.startswith("Select"):
                offset += _signed(node._saved_index) % node._saved_self_sym_sizes[positions]
                positions = rows
            elif name.startswith("Slice") and node._saved_step == 1:
                offset += _signed(node._saved_start) % max(node._saved_self_sym_sizes[positions], 1)
            else:
                positions = None
        if rows is None:
            return None
    assert rows is not None
    return Source(call, output, kind, rows, positions, offset)


def _cut_axis(node: Node, name: str) -> int | None:
    """The axis of its input that a slice, split or select goes along."""
    if name.startswith(("Slice", "Split")):
        return _axis(node, node._saved_dim)
    return _signed(node._saved_dim) % len(node._saved_self_sym_sizes) if name.startswith("Select") else None


def _through_view(
    before: tuple[int, ...], after: tuple[int, ...], rows: int | None, positions: int | None
) -> tuple[int | None, int | None]:
    """Axes after a reshape: those before the first change stay; rows on axis 0 may take positions in."""
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    if rows is not None and rows < same:
        return rows, positions if positions is not None and positions < same else None
    if rows != 0 or not after:
        return None, None
    if positions == 1 and after[0] == before[0] * before[1] and after[1:] == before[2:]:
        return 0, 0
    if positions == 0 and len(after) > 1 and before[0] == after[0] * after[1] and before[1:] == after[2:]:
        return 0, 1
    return 0, None


def _moved(node: Node, name: str, axis: int | None) -> int | None:
    """Where an axis goes in an operation on axes; None if it is lost, or cut."""
    if axis is None:
        return None
    if name.startswith("Transpose"):
        a, b = _axis(node, node._saved_dim0), _axis(node, node._saved_dim1)
        return b if axis == a else a if axis == b else axis
    if name == "TBackward0":
        return 1 - axis
    if name.startswith("Permute"):
        return [_axis(node, dim) for dim in node._saved_dims].index(axis)
    if name.startswith("Unsqueeze"):
        return axis + (_axis(node, node._saved_dim) <= axis)
    if name.startswith("Expand"):
        return axis + _rank(node) - len(node._saved_self_sym_sizes)
    if name == "SqueezeBackward0":
        sizes = node._saved_self_sym_sizes
        return None if sizes[axis] == 1 else axis - sum(size == 1 for size in sizes[:axis])
    if name.startswith(("Slice", "Split")):
        whole = name.startswith("Slice") and node._input_metadata[0].shape[axis] == node._saved_self_sym_sizes[axis]
        return axis if whole or _axis(node, node._saved_dim) != axis else None
    if name.startswith(("Select", "Squeeze", "Sum", "Mean")):
        sizes = node._saved_self_sym_sizes
        dims = node._saved_dim if isinstance(node._saved_dim, tuple) else (node._saved_dim,)
        gone = {_signed(dim) % len(sizes) for dim in dims}
        if name.startswith("Squeeze"):
            gone = {dim for dim in gone if sizes[dim] == 1}
        if axis in gone:
            return None
        return axis if getattr(node, "_saved_keepdim", False) else axis - sum(dim < axis for dim in gone)
    return axis


def cuts_rows(source: Source, tensor: Tensor, total: int) -> bool:
    """Whether ``tensor`` holds other rows than the call's, by its size."""
    return tensor.dim() <= source.row_axis or tensor.shape[source.row_axis] % total != 0


def _kind(name: str, parents: list[Node]) -> Kind:
    if name in ("LogSoftmaxBackward0", "LogBackward0", "LogSigmoidBackward0"):
        return "logp"
    if name == "SubBackward0" and any(parent.name() == "LogsumexpBackward0" for parent in parents):
        return "logp"
    return "prob" if name in ("SoftmaxBackward0", "ExpBackward0") else "unknown"


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
        if picked and _kind(name, [p for p in parents if p is not None]) == "logp":
            return True
        if name == "SubBackward0" and {"GatherBackward0", "LogsumexpBackward0"} <= _origins(parents):
            return True
        picked = picked or name in ("GatherBackward0", "IndexBackward0")
        if name in _ELEMENTWISE or name in _SHAPE or name in ("GatherBackward0", "IndexBackward0"):
            stack.extend((parent, picked, depth + 1) for parent in parents)
    return False


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


def find_loss_scales(root: Node, gradient: float = 1.0) -> None:
    """Note the loss's own scale on every observation and gated call that ``root`` leads to.

    It is the product of the scalar factors from the loss down to its first sum or mean over samples: ``1/N`` for a
    mean, times a GradScaler's scale, over the accumulation steps. To be called before the backward, which frees the
    factors.

    Args:
        root: the loss's ``grad_fn``.
        gradient: what the backward starts with.
    """
    seen: set[Node] = set()
    # (node, factors so far, factors above the first addition)
    stack: list[tuple[Node, float, float | None]] = [(root, gradient, None)]
    while stack:
        node, factor, above = stack.pop()
        if node in seen or hasattr(node, "kondo_call"):
            continue
        seen.add(node)
        name = node.name()
        parents = list(node.next_functions)

        def scale(reduction: float, factor: float = factor, above: float | None = above) -> Scale:
            if above is None:
                return Scale(abs(factor), 1.0, reduction)
            return Scale(abs(above), abs(factor / above), reduction)

        if (observation := node.metadata.get(OBSERVATION)) is not None:
            if observation.own_scale is not None:
                observation.scale = scale(observation.own_scale)
                continue
            # Not reduced at all: a scalar factor on a single log-prob is its advantage.
            observation.scale = Scale(1.0 if above is None else abs(above), 1.0, 1.0)
        if (reduced := _reduced(node, name, parents)) is not None:
            _note_below(node, scale(1 / reduced if "mean" in name.lower() else 1.0), seen)
            continue
        if name in ("AddBackward0", "SubBackward0") and above is None:
            above = factor
        factors = _scalar_factors(node, name, factor, len(parents))
        stack.extend((p, f, above) for (p, _), f in zip(parents, factors, strict=True) if p is not None)


def _reduced(node: Node, name: str, parents: list[Edge]) -> int | None:
    """How many values a sum, mean or product over samples makes one of; None if the node is none of these."""
    if not name.startswith(_REDUCTIONS) or torch.Size(node._input_metadata[0].shape).numel() != 1:
        return None
    if (sizes := getattr(node, "_saved_self_sym_sizes", None)) is not None:
        return torch.Size(sizes).numel() if len(sizes) else None
    sizes = [parent._input_metadata[nr].shape for parent, nr in parents if parent is not None]
    return max((torch.Size(shape).numel() for shape in sizes if len(shape)), default=None)


def _note_below(node: Node, scale: Scale, seen: set[Node]) -> None:
    stack = [parent for parent, _ in node.next_functions if parent is not None]
    while stack:
        node = stack.pop()
        if (call := getattr(node, "kondo_call", None)) is not None:
            call.scale = scale
        elif node not in seen:
            seen.add(node)
            if (observation := node.metadata.get(OBSERVATION)) is not None:
                own = observation.own_scale
                observation.scale = scale if own is None else Scale(scale.above, scale.below, scale.reduction * own)
            stack.extend(parent for parent, _ in node.next_functions if parent is not None)


def _scalar_factors(node: Node, name: str, factor: float, parents: int) -> list[float]:
    """The factor that reaches each parent of an operation on scalars."""
    if name == "MulBackward0":
        return [factor * _scalar(node, "_saved_other"), factor * _scalar(node, "_saved_self")]
    if name == "DivBackward0":
        return [factor / _scalar(node, "_saved_other"), factor]
    if name in ("SubBackward0", "AddBackward0"):
        return [factor, factor * float(getattr(node, "_saved_alpha", 1))]
    return [factor] * parents


def _scalar(node: Node, name: str) -> float:
    value = getattr(node, name, None)
    if not isinstance(value, Tensor) or value.numel() != 1:
        return 1.0
    return value.detach().item() or 1.0
