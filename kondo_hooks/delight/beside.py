"""Parameters of the gated model that loss code uses itself, such as a policy's ``log_std`` beside the mean it returns.

Where such a parameter meets rows, its gradient is a sum over all rows that no replay makes. The operation's own share
is held back during the backward and sent on once it is known which rows are kept, with that of the others zeroed.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kondo_hooks.delight.graph import Node, Source, edge_shape, is_gated, sources_of_result

_RETAIN = 2  # where Tensor.backward and torch.autograd.backward take retain_graph


@dataclass(eq=False)
class Meeting:
    """An operation of the loss code whose operands are rows and, on their own, parameters.

    Attributes:
        node: the operation.
        slots: its operands that come from parameters alone.
        sources: the calls that the rows of its result come from; None if these rows cannot be followed, or come from
            others, too.
        leaves: ids of the parameters.
        others: whether leaves that are none of the parameters stand behind these operands, too.
        first: the rows of its result that ran before they were decided on: dropped ones were not run.
        sent: what the backward brought to its result; None before, or if that is not wanted.
    """

    node: Node
    slots: list[int]
    sources: list[Source] | None
    leaves: frozenset[int]
    others: bool = False
    first: frozenset[Node] = frozenset()
    sent: Tensor | None = None

    @property
    def is_split(self) -> bool:
        """Whether each row's share can be told from the others'."""
        sources = self.sources or []
        alone = len(sources) == 1 or not any(source.call.decides_at_once for source in sources)
        return bool(sources) and alone and all(source.repeat == 1 and source.parts == 1 for source in sources)

    def hold(self) -> Any:
        """Keep back what the coming backward sends to the parameters; returns the hook, to be removed after it."""

        def hold(received: tuple[Tensor | None, ...], sent: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            if sent[0] is None or all(received[slot] is None for slot in self.slots):
                return received
            self.sent = sent[0].detach()
            held = list(received)
            for slot in self.slots:
                grad = received[slot]
                held[slot] = None if grad is None else torch.zeros_like(grad)
            return tuple(held)

        return self.node.register_hook(hold)

    def is_ready(self, calls: Collection[int]) -> bool:
        """Whether the backward came by, and its calls are among these, by their ids."""
        return self.sent is not None and all(id(source.call) in calls for source in self.sources or ())

    def release(self, factors: Mapping[int, Tensor]) -> list[tuple[torch.autograd.graph.GradientEdge, Tensor]]:
        """What is due to each operand, now that each row's factor is known.

        Args:
            factors: (B,) of each call, by its id.
        """
        assert self.sources is not None and self.sent is not None
        each = torch.cat([factors[id(source.call)] for source in self.sources]).to(self.sent)
        shape = [1] * self.sent.dim()
        shape[self.sources[0].row_axis] = -1
        with torch.no_grad():
            # A dropped row's gradient may be infinite.
            kept = torch.where((each != 0).view(shape), self.sent * each.view(shape), torch.zeros_like(self.sent))
            received = self.node(kept)
        received = received if isinstance(received, tuple) else (received,)
        due = []
        for slot in self.slots:
            parent, nr = self.node.next_functions[slot]
            if (grad := received[slot]) is not None:
                due.append((torch.autograd.graph.GradientEdge(parent, nr), grad.sum_to_size(edge_shape((parent, nr)))))
        return due


def find_meetings(roots: Sequence[Node], leaves: Collection[int]) -> list[Meeting]:
    """Where a loss mixes leaves with rows of gated calls, so that each row has a share in their gradients.

    A penalty on a leaf that is added to a loss which has been reduced is none of that.

    Args:
        roots: the loss's ``grad_fn``.
        leaves: ids of the leaves.
    """
    origins: dict[Node, _Origin] = {}
    meetings: list[Meeting] = []
    stack = list(roots)
    while stack:
        node = stack[-1]
        edges = [] if is_gated(node) else [edge for edge in node.next_functions if edge[0] is not None]
        missing = [parent for parent, _ in edges if parent not in origins]
        if node not in origins and missing:
            stack += missing
            continue
        stack.pop()
        if node in origins:
            continue
        each = [origins[parent] for parent, _ in edges]
        calls = frozenset().union(*(origin.calls for origin in each))
        first = frozenset().union(*(origin.first for origin in each))
        if is_gated(node):
            calls |= {id(getattr(node, "kondo_call", node))}
            first |= {node} if hasattr(node, "kondo_rows") else frozenset()
        leaf = id(getattr(node, "variable", None))
        mine = frozenset().union(*(origin.leaves for origin in each)) | ({leaf} & set(leaves))
        others = any(origin.others for origin in each) or (hasattr(node, "variable") and leaf not in leaves)
        origins[node] = _Origin(calls, mine, others, first)
        if any(origin.leaves and not origin.calls for origin in each) and any(origin.calls for origin in each):
            meetings += _meeting(node, origins)
    return meetings


@dataclass(frozen=True)
class _Origin:
    """What a node comes from: calls, leaves that are asked for, whether any other leaf, and rows that ran first."""

    calls: frozenset[int]
    leaves: frozenset[int]
    others: bool
    first: frozenset[Node]


def _meeting(node: Node, origins: Mapping[Node, _Origin]) -> list[Meeting]:
    """No meeting where reduced values are added up: neither has a share in the other's gradient."""
    slots: list[int] = []
    mine: frozenset[int] = frozenset()
    reduced, others = node.name().startswith(("Add", "Sub", "Rsub", "Stack", "Cat")), False
    for slot, (parent, nr) in enumerate(node.next_functions):
        if parent is None:
            continue
        origin = origins[parent]
        if origin.leaves and not origin.calls:
            slots.append(slot)
            mine |= origin.leaves
            others |= origin.others
        reduced = reduced and not (origin.calls and math.prod(edge_shape((parent, nr))) > 1)
    sources = sources_of_result(node)
    if sources and {id(source.call) for source in sources} != origins[node].calls:
        sources = None  # rows of another call are mixed in, and may be decided on otherwise
    return [] if reduced and not sources else [Meeting(node, slots, sources, mine, others, origins[node].first)]


def retaining(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """A backward's arguments such that its graph stays, and whether it would have stayed anyway."""
    place = _RETAIN + (func is torch.autograd.grad)
    creates = args[place + 1] if len(args) > place + 1 else kwargs.get("create_graph", False)
    told = args[place] if len(args) > place else kwargs.get("retain_graph")
    if len(args) > place:
        args = (*args[:place], True, *args[place + 1 :])
    else:
        kwargs = {**kwargs, "retain_graph": True}
    return args, kwargs, bool(creates if told is None else told)
