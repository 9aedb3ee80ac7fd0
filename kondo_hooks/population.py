"""One backward's population: what arrived at its calls' nodes, read as delight and cut into kept rows."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kondo_hooks.batch import Layout, kept_rows
from kondo_hooks.delight import Boundary, holds_policy, read_boundary, read_field, read_terms
from kondo_hooks.errors import DelightError, no_batch_axis, no_rows_in_loss
from kondo_hooks.node import Call
from kondo_hooks.parts import Part, same_values
from kondo_hooks.selection import Signal
from kondo_hooks.trace import Scale
from kondo_hooks.watch import join


@dataclass
class Arrival:
    """A call that a backward has reached.

    Attributes:
        call: the call.
        node: its autograd node.
        grads: the loss gradient at each of its outputs; None where the loss did not use one.
        keep_graph: whether the graph is retained for another backward.
        task: id of the backward.
        to_parameters: whether the backward wants the parameters' gradients, or only some input's.
        signal: (B, P) what is known of its samples, once it was read.
        offset: position on the outputs' second axis where the signal starts.
        scale: the loss's own scale, which was divided out of the signal.
        forced: (B,) rows that are kept whatever their delight; None if there are none.
        follows: the call of the same rows that holds their policy, where this one holds none: one decision is for both.
        held: the rows that can still be chosen, where the call has let go of the rest.
    """

    call: Call
    node: Any
    grads: list[Tensor | None]
    keep_graph: bool
    task: int
    to_parameters: bool
    signal: Signal | None = None
    offset: int = 0
    scale: float = 1.0
    forced: Tensor | None = None
    follows: "Arrival | None" = None
    held: Part | None = None

    def unsplit(self) -> list[int]:
        """Outputs without rows that the loss used."""
        call = self.call
        used = [i for i, grad in enumerate(self.grads) if grad is not None]
        return [i for i in used if call.rows[i] is None and not call.is_shared(i)]

    def check(self) -> None:
        """Refuse gradients that cannot be split into rows."""
        call = self.call
        for i in self.unsplit():
            path = call.paths[i]
            raise RuntimeError(no_rows_in_loss(path) if call.makes_loss(i) else no_batch_axis(path, call.batch))
        if call.inner is not None:
            call.inner.check()

    def follow(self, others: Iterable["Arrival"]) -> None:
        """Be decided on with the first of these that was called on the same rows."""
        for other in others:
            if same_rows(self.call, other.call):
                self.follows, self.offset = other, other.offset
                if self.forced is not None:
                    other.forced = self.forced if other.forced is None else other.forced | self.forced
                return

    def policy(self) -> frozenset[int]:
        """The outputs that hold the policy, as its delight was found."""
        call = self.call
        seen = {s.output for o in call.observations if o.used_by(self.task) for s in o.sources if s.call is call}
        seen |= set() if call.named is None else {call.named[1]}
        boundaries = self.boundaries()
        found = seen | {out.index for out in boundaries if out.told or out.field or call.is_summed(out.index)}
        if not found:
            found = {out.index for out in boundaries if len(boundaries) == 1 or holds_policy(out)}
        return frozenset(found)

    def others(self) -> list[int]:
        """Outputs with rows that get a gradient and hold no policy."""
        call = self.call
        return [
            i
            for i, (grad, where) in enumerate(zip(self.grads, call.rows, strict=True))
            if grad is not None and where is not None and i not in call.policy and not call.makes_loss(i) and grad.any()
        ]

    def overflowed(self) -> Tensor | None:
        """(B,) rows whose gradient left the range of float16: they are kept, for a GradScaler has to see them."""
        call = self.call
        if not any(grad is not None and grad.dtype == torch.float16 for grad in self.grads):
            return None
        rows = torch.zeros(call.batch, dtype=torch.bool, device=call.outputs[0].device)
        for where, grad in zip(call.rows, self.grads, strict=True):
            if where is not None and grad is not None and grad.dtype == torch.float16:
                rows |= ~where.first(grad).flatten(1).isfinite().all(1) if grad.dim() > 1 else ~grad.isfinite()
        return rows if rows.any() else None

    def boundaries(self) -> list[Boundary]:
        """The outputs that the loss used, rows first."""
        call = self.call
        told = call.named
        return [
            Boundary(path, where.first(value), where.first(grad), told[0] if told and told[1] == i else None, i)
            for i, (path, where, value, grad) in enumerate(
                zip(call.paths, call.rows, call.outputs, self.grads, strict=True)
            )
            if grad is not None and where is not None and call.has_policy(i)
        ]

    def part(self, factors: Tensor) -> Part | None:
        """The kept rows with their weighted gradients; None if no row is kept.

        Args:
            factors: (B,) or (B, P), 0 where dropped.
        """
        rows = kept_rows(factors).to(self._device)
        if not len(rows):
            return None
        return self._take(rows).weighted(factors.to(rows.device)[rows], self.offset)

    def stand_in(self) -> Part:
        """One row with a gradient of zero: parameters then get zero, as a masked loss gives them, not None."""
        if self.held is not None:
            return self.held.select(torch.zeros(1, dtype=torch.long, device=self._device)).silenced()
        return Part.stand_in(self.call, torch.zeros(1, dtype=torch.long, device=self._device), self.grads)

    def hold(self, rows: Tensor, layout: Layout) -> None:
        """Keep these rows, at least one, and let go of the others and of the call's tensors."""
        if not len(rows):
            rows = torch.zeros(1, dtype=torch.long, device="cpu") if self.held is None else self.held.rows[:1]
        self.held = self._take(rows.to(self._device)).hold(layout)
        self.grads = [None] * len(self.grads)
        if not self.keep_graph:
            self.call.slim()

    @property
    def _device(self) -> torch.device:
        return self.call.outputs[0].device

    def _take(self, rows: Tensor) -> Part:
        if self.held is not None:
            return self.held.select(torch.searchsorted(self.held.rows, rows))
        return Part.of(self.call, rows, self.grads)


def same_rows(a: Call, b: Call) -> bool:
    """Whether two calls were given the same rows: a tensor of rows that they have in common."""
    if a.batch != b.batch:
        return False
    mine, theirs = ([leaf for leaf, where in zip(c.inputs, next(c.readings()), strict=True) if where] for c in (a, b))
    return any(same_values(x, y) for x in mine for y in theirs if x.dtype == y.dtype and x.device == y.device)


def find_scales(arrivals: Sequence[Arrival]) -> list[float]:
    """The loss's own scale at each call; 1 / rows is assumed where the loss's graph did not tell.

    A factor that multiplies one call's term of a sum is a weight of that call where the calls' factors make up for the
    sizes of their means, or are all the same; else it is an advantage (``loss = loss + R[t] * nll``).
    """
    assumed = 1 / sum(a.call.batch for a in arrivals)
    noted: list[Scale | None] = [
        next((o.scale for o in a.call.observations if o.used_by(a.task) and o.scale is not None), a.call.scale)
        for a in arrivals
    ]
    found = [scale for scale in noted if scale is not None]
    if len(found) < len(noted):
        return [assumed * (found[0].above if found else 1.0)] * len(noted)
    weights = _alike([scale.product for scale in found]) or _alike([scale.below for scale in found])
    return [scale.product if weights else scale.above * scale.reduction for scale in found]


def _alike(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= 1e-5 * max(values)


def find_signal(
    arrival: Arrival, scale: float, tokens: bool, is_selected: Callable[[Arrival], bool], warn: Callable[[float], None]
) -> tuple[Signal, int]:
    """Delight of one call, and the position of its outputs where the signal starts.

    Taken from the first that applies: log-probs that were told, an output of the model, seen in the loss
    code, read off the boundary.

    Args:
        arrival: the call and its gradients.
        scale: the loss's own scale, divided out of the advantages.
        tokens: positions are chosen one by one, so it must be known which they are.
        is_selected: whether the model's only output was picked from log-probs.
        warn: told how far the loss is from a policy gradient, when it was read off the boundary.

    Returns:
        A signal of (B, P) in advantage x nats.
    """
    signals, offset = _find(arrival, is_selected, warn)
    if tokens and (len(signals) > 1 or offset is None):
        raise DelightError(
            "gated: unit='token' needs one log-prob a token, in the order of the model's output (B, T, ...), but "
            + (f"the loss uses {len(signals)}" if len(signals) > 1 else "the loss takes it from other positions")
            + "; mark it with gate.logp(...), or leave unit='sample'"
        )
    signal = join(signals)
    device = arrival.call.outputs[0].device
    advantages = signal.advantages.to(device) / scale
    return Signal(advantages, signal.surprisal.to(device), signal.valid.to(device)), offset or 0


def _find(
    arrival: Arrival, is_selected: Callable[[Arrival], bool], warn: Callable[[float], None]
) -> tuple[list[Signal], int | None]:
    call = arrival.call
    used = [o for o in call.observations if o.used_by(arrival.task)]
    if told := [o for o in used if o.told]:
        return [o.signal(call) for o in told], told[0].offset(call)
    boundaries = arrival.boundaries()
    if fields := read_field(boundaries):
        return fields, 0
    if call.named is not None:
        used = [o for o in used if o.is_of(call, call.named[1])]
    # A value picked from raw outputs may be a Q-value; a logit's gradients sum to zero over the actions.
    if seen := [o for o in used if not o.raw or any(o.is_of(call, b.index) and b.sums_to_zero() for b in boundaries)]:
        return [o.signal(call) for o in seen], seen[0].offset(call)
    if terms := [out for out in boundaries if call.is_summed(out.index)]:
        return [read_terms(out) for out in terms], 0
    signals, residual = read_boundary(boundaries, lambda: is_selected(arrival))
    warn(residual)
    return signals, 0
