"""One backward's population: what arrived at its calls' nodes, read as delight and cut into kept rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kondo_hooks.delight import Boundary, read_boundary, read_field
from kondo_hooks.errors import DelightError, no_batch_axis
from kondo_hooks.node import Call
from kondo_hooks.replay import Part
from kondo_hooks.selection import Signal
from kondo_hooks.watch import join


@dataclass
class Arrival:
    """A call that a backward has reached.

    Attributes:
        call: the call.
        node: its autograd node.
        grads: the loss gradient at each of its outputs; None where the loss did not use one.
        keep_graph: whether the graph is retained for another backward.
        to_parameters: whether the backward wants the parameters' gradients, or only some input's.
    """

    call: Call
    node: Any
    grads: list[Tensor | None]
    keep_graph: bool
    to_parameters: bool

    def check(self) -> None:
        """Refuse gradients that cannot be split into rows."""
        for path, rows, grad in zip(self.call.paths, self.call.rows, self.grads, strict=True):
            if rows is None and grad is not None:
                raise RuntimeError(no_batch_axis(path, self.call.batch))

    def overflowed(self) -> Tensor:
        """(B,) rows whose gradient left the range of float16: they are kept, for a GradScaler has to see them."""
        call = self.call
        rows = torch.zeros(call.batch, dtype=torch.bool, device=call.outputs[0].device)
        for where, grad in zip(call.rows, self.grads, strict=True):
            if where is not None and grad is not None and grad.dtype == torch.float16:
                rows |= ~where.first(grad).flatten(1).isfinite().all(1) if grad.dim() > 1 else ~grad.isfinite()
        return rows

    def boundaries(self) -> list[Boundary]:
        """The outputs that the loss used, rows first."""
        call = self.call
        told = call.named
        return [
            Boundary(path, where.first(value), where.first(grad), told[0] if told and told[1] == i else None)
            for i, (path, where, value, grad) in enumerate(
                zip(call.paths, call.rows, call.outputs, self.grads, strict=True)
            )
            if grad is not None and where is not None
        ]

    def part(self, factors: Tensor, offset: int) -> Part | None:
        """The kept rows with their weighted gradients; None if no row is kept.

        Args:
            factors: (B,) or (B, P), 0 where dropped.
            offset: position on the outputs' second axis where the P positions start.
        """
        kept = factors if factors.dim() == 1 else factors.ne(0).any(1)
        rows = kept.nonzero().flatten().to(self.call.outputs[0].device)
        if not len(rows):
            return None
        gains = factors.to(rows.device)[rows]
        plain = bool((gains == 1).all())
        grads: list[Tensor | None] = []
        for where, grad in zip(self.call.rows, self.grads, strict=True):
            if grad is None or where is None:
                grads.append(None)
            else:
                taken = where.take(grad, rows)
                grads.append(taken if plain else where.weighted(taken, gains, offset))
        return Part(self.call, rows, grads)

    def silent_part(self) -> Part:
        """One row with a gradient of zero: parameters then get zero, as a masked loss gives them, not None."""
        row = torch.zeros(1, dtype=torch.long, device=self.call.outputs[0].device)
        grads = [
            None if grad is None or where is None else where.take(grad, row).zero_()
            for where, grad in zip(self.call.rows, self.grads, strict=True)
        ]
        return Part(self.call, row, grads)


def find_scales(arrivals: Sequence[Arrival]) -> list[float]:
    """The loss's own scale at each call; 1 / rows is assumed where the loss's graph did not tell."""
    assumed = 1 / sum(a.call.batch for a in arrivals)
    scales = []
    for a in arrivals:
        noted = [o.scale for o in a.call.observations if o.grad is not None] + [a.call.scale]
        scales.append(next((scale for scale in noted if scale), assumed))
    return scales


def overflow_mask(arrivals: Sequence[Arrival], signals: Sequence[Signal], tokens: bool) -> Tensor | None:
    """(N,) samples whose gradients overflowed float16, over the population; None if there are none."""
    rows = [a.overflowed() for a in arrivals]
    if not any(bool(r.any()) for r in rows):
        return None
    if tokens:
        rows = [r.repeat_interleave(s.valid.numel() // len(r)) for r, s in zip(rows, signals, strict=True)]
    return torch.cat(rows)


def find_signal(
    arrival: Arrival, scale: float, single: bool, warn_residual: Callable[[float], None]
) -> tuple[Signal, int]:
    """Delight of one call, and the position on its outputs' second axis where the signal starts.

    Taken from the first that applies: log-probs that were told, an output of the model, seen in the loss
    code, read off the boundary.

    Args:
        arrival: the call and its gradients.
        scale: the loss's own scale, divided out of the advantages.
        single: refuse several log-probs a row, whose positions could not be told apart.
        warn_residual: told how far the loss is from a policy gradient, when it was read off the boundary.

    Returns:
        A signal of (B, P) in advantage x nats.
    """
    signals, offset = _find(arrival, warn_residual)
    if single and len(signals) > 1:
        raise DelightError(
            f"gated: unit='token' needs one log-prob a token, but the loss uses {len(signals)}; mark the one that "
            "counts with gate.logp(...)"
        )
    signal = join(signals)
    device = arrival.call.outputs[0].device
    return Signal(signal.advantages.to(device) / scale, signal.surprisal.to(device), signal.valid.to(device)), offset


def _find(arrival: Arrival, warn_residual: Callable[[float], None]) -> tuple[list[Signal], int]:
    call = arrival.call
    used = [(o, s) for o in call.observations if (s := o.signal(call)) is not None]
    if told := [(o, s) for o, s in used if o.told]:
        return [s for _, s in told], told[0][0].offset(call)
    if call.named is not None:
        used = [(o, s) for o, s in used if o.is_of(call, call.named[1])]
    boundaries = arrival.boundaries()
    if fields := read_field(boundaries):
        return fields, 0
    # A value picked from raw outputs may be a Q-value; a logit's gradients sum to zero over the actions.
    if seen := [(o, s) for o, s in used if not o.raw or any(b.sums_to_zero() for b in boundaries)]:
        return [s for _, s in seen], seen[0][0].offset(call)
    signals, residual = read_boundary(boundaries)
    warn_residual(residual)
    return signals, 0
