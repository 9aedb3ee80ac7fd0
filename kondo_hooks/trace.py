"""Following autograd's graph: from a tensor back to the gated calls that it came from, and from a loss to its scale.

The graph's nodes are torch's own; their names and saved attributes are read here and nowhere else.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Node = Any  # torch.autograd.graph.Node, without a public constructor to check against
Kind = Literal["logp", "nll", "prob", "logit", "unknown"]

# Operations between a model's output and the tensor that the action is picked from which keep row i in
# row i. Anything else (a permutation, a boolean mask) is not trusted to.
_ROWWISE = {
    f"{name}Backward{i}"
    for i in (0, 1, 2)
    for name in (
        "Add Sub Mul Div Neg Exp Log Log1P Pow Clamp ClampMin ClampMax Where MaskedFill IndexPut Tanh Sigmoid "
        "LogSigmoid LogSoftmax Softmax Softplus Abs Relu Maximum Minimum ToCopy Clone Copy Alias View UnsafeView "
        "ReshapeAlias Unsqueeze Squeeze Expand Slice Select Transpose Permute Split"
    ).split()
} | {"torch::autograd::CopySlices"}
_DEPTH = 64
_NODES = 8192

# Where an observation stands in the metadata of the node that it observes.
OBSERVATION = "kondo_observation"


@dataclass(frozen=True)
class Source:
    """A gated call that a tensor descends from, and how.

    Attributes:
        call: the call record.
        output: which of the call's differentiable outputs.
        kind: what the tensor holds by the operations that made it.
        offset: first position of the call's second axis that the tensor's positions stand for.
    """

    call: Any
    output: int
    kind: Kind
    offset: int


def find_sources(tensor: Tensor, trust: bool = False) -> list[Source] | None:
    """The gated calls that ``tensor``'s rows come from, in row order; None if that cannot be followed.

    ``trust`` accepts operations that are not known to keep the rows in order.
    """
    if tensor.grad_fn is None:
        return None
    return _follow((tensor.grad_fn, tensor.output_nr), "unknown", 0, trust, _DEPTH)


def _follow(edge: tuple[Node, int], kind: Kind, offset: int, trust: bool, depth: int) -> list[Source] | None:
    while depth:
        depth -= 1
        node, output = edge
        if (call := getattr(node, "kondo_call", None)) is not None:
            return [Source(call, output, kind, offset)]
        name = node.name()
        parents = [(parent, nr) for parent, nr in node.next_functions if parent is not None]
        if name in ("CatBackward0", "StackBackward0"):
            if _axis(node, node._saved_dim) != 0:
                return None
            sources: list[Source] = []
            for parent in parents:
                if (found := _follow(parent, kind, offset, trust, depth)) is None:
                    return None
                sources += found
            return sources
        if not parents or not (trust or name in _ROWWISE):
            return None
        if not trust and not _keeps_rows(node, name):
            return None
        if kind == "unknown":
            kind = _kind(name, [parent for parent, _ in parents])
        if name in ("SliceBackward0", "SelectBackward0"):
            sizes = node._saved_self_sym_sizes
            if _signed(node._saved_dim) % len(sizes) == 1:
                start = node._saved_start if name == "SliceBackward0" else node._saved_index
                offset += _signed(start) % max(sizes[1], 1)
        if len(parents) == 1:
            edge = parents[0]
            continue
        for parent in parents:
            if (found := _follow(parent, kind, offset, trust, depth)) is not None:
                return found
        return None
    return None


def _signed(value: int) -> int:
    """Autograd nodes hand out negative numbers as unsigned 64-bit ones."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _axis(node: Node, dim: int) -> int:
    return _signed(dim) % max(len(node._input_metadata[0].shape), 1)


def _keeps_rows(node: Node, name: str) -> bool:
    """False if an operation on axes moves or removes the first one."""
    if name == "SelectBackward0":
        return _signed(node._saved_dim) % len(node._saved_self_sym_sizes) != 0
    if name in ("SliceBackward0", "SplitBackward0", "UnsqueezeBackward0"):
        return _axis(node, node._saved_dim) != 0
    if name == "TransposeBackward0":
        return 0 not in (_axis(node, node._saved_dim0), _axis(node, node._saved_dim1))
    if name == "PermuteBackward0":
        return _axis(node, node._saved_dims[0]) == 0
    return True


def _kind(name: str, parents: list[Node]) -> Kind:
    if name in ("LogSoftmaxBackward0", "LogBackward0", "LogSigmoidBackward0"):
        return "logp"
    if name == "SubBackward0" and any(parent.name() == "LogsumexpBackward0" for parent in parents):
        return "logp"
    return "prob" if name in ("SoftmaxBackward0", "ExpBackward0") else "unknown"


def find_loss_scales(root: Node, gradient: float = 1.0) -> None:
    """Note the loss's own scale ``s`` on every observation and gated call that ``root`` leads to.

    It is the product of the scalar factors from the loss down to its first sum or mean over samples: ``1/N`` for a
    mean, times a GradScaler's scale, over the accumulation steps. Where samples are added up one by one
    (``loss = loss + ...``), the factors above the first addition. To be called before the backward, which frees
    the factors.

    Args:
        root: the loss's ``grad_fn``.
        gradient: what the backward starts with.
    """
    seen: set[Node] = set()
    # (node, scalar factors so far, factors above the first addition)
    stack: list[tuple[Node, float, float]] = [(root, gradient, 1.0)]
    while stack and len(seen) < _NODES:
        node, factor, above = stack.pop()
        if node in seen or hasattr(node, "kondo_call"):
            continue
        seen.add(node)
        name = node.name()
        shape = _reduced_shape(node, name)
        if (observation := node.metadata.get(OBSERVATION)) is not None:
            own = observation.own_scale
            observation.scale = abs(above) if own is None else abs(factor) * own
            if own is not None:
                continue
        if shape:
            _note_below(node, abs(factor) / (shape.numel() if name.startswith("Mean") else 1), seen)
            continue
        if name == "AddBackward0" and above == 1.0:
            above = factor
        parents = [parent for parent, _ in node.next_functions]
        factors = _scalar_factors(node, name, factor, len(parents))
        stack.extend((p, f, above) for p, f in zip(parents, factors, strict=True) if p is not None)


def _note_below(node: Node, scale: float, seen: set[Node]) -> None:
    stack = [parent for parent, _ in node.next_functions if parent is not None]
    while stack and len(seen) < _NODES:
        node = stack.pop()
        if (call := getattr(node, "kondo_call", None)) is not None:
            call.scale = scale
        elif node not in seen:
            seen.add(node)
            if (observation := node.metadata.get(OBSERVATION)) is not None:
                observation.scale = scale
            stack.extend(parent for parent, _ in node.next_functions if parent is not None)


def _reduced_shape(node: Node, name: str) -> torch.Size | None:
    if name not in ("MeanBackward0", "SumBackward0", "MeanBackward1", "SumBackward1"):
        return None
    return torch.Size(node._saved_self_sym_sizes)


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
