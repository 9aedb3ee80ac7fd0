"""One backward's population: what arrived at its calls' nodes, read as delight and cut into kept rows."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kondo_hooks.core.call import Call
from kondo_hooks.core.compact import RankOne
from kondo_hooks.core.kept_rows import Part, same_values
from kondo_hooks.core.packs import Packed, cut, is_shifted, whole_pack
from kondo_hooks.core.positions import Positions
from kondo_hooks.core.texts import Texts
from kondo_hooks.delight.boundary import (
    Boundary,
    Kind,
    find_policy,
    holds_policy,
    read_field,
    read_policy,
    read_terms,
    selected_outputs,
)
from kondo_hooks.delight.graph import Bend, Path, read_scales, scale_along
from kondo_hooks.delight.loss_code import Picked, join
from kondo_hooks.errors import DelightError, WarnOnce, no_batch_axis, no_policy_in_terms, no_rows_in_loss
from kondo_hooks.rows.axes import Layout, Rows
from kondo_hooks.rules.readback import Readback, to_device
from kondo_hooks.rules.samples import Kept, Signal


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
        source: the output that the signal was read from, if that is known.
        positions: of outputs whose rows begin with an axis as long as the signal's, whether it is the positions'.
        scale: the loss's own scale, which was divided out of the signal; a tensor where the host does not know it yet.
        forced: (B,) rows that are kept whatever their delight; None if there are none.
        follows: the call of the same rows that holds their policy, where this one holds none: one decision is for both.
        held: the rows that can still be chosen, where the call has let go of the rest.
        cuts: whether its rows are cut after their last kept position.
        cut: where its positions are then.
        texts: of rows that hold several, which then are the samples.
        forms: the gradients at a pack's logits while it waits, by output: ``grads`` has nothing of them then.
    """

    call: Call
    node: Any
    grads: list[Tensor | None]
    keep_graph: bool
    task: int
    to_parameters: bool
    signal: Signal | None = None
    offset: int = 0
    source: int | None = None
    positions: dict[int, bool] = field(default_factory=dict)
    scale: float | Tensor = 1.0
    forced: Tensor | None = None
    follows: "Arrival | None" = None
    held: Part | None = None
    cuts: bool = False
    cut: Positions | None = None
    texts: Texts | None = None
    forms: dict[int, RankOne] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """How many there are to choose from: rows, or texts."""
        return self.call.batch if self.texts is None else len(self.texts)

    def unsplit(self) -> list[int]:
        """Outputs without rows that the loss used."""
        call = self.call
        used = [i for i, grad in enumerate(self.grads) if grad is not None]
        return [i for i in used if call.rows[i] is None and not call.is_shared(i)]

    def check(self, back: Readback) -> None:
        """Refuse gradients that cannot be split into rows; some of it once ``back`` is read."""
        call = self.call
        for i in self.unsplit():
            path = call.paths[i]
            raise RuntimeError(no_rows_in_loss(path) if call.makes_loss(i) else no_batch_axis(path, call.batch))
        if call.inner is not None:
            call.inner.check(back)

    def follow(self, others: Iterable["Arrival"]) -> None:
        """Be decided on with the first of these that was called on the same rows."""
        for other in others:
            same_texts = other.texts is None if self.texts is None else self.texts.is_same(other.texts)
            if same_texts and same_rows(self.call, other.call):
                self.follows, self.offset, self.scale = other, other.offset, other.scale
                if self.forced is not None:
                    other.forced = self.forced if other.forced is None else other.forced | self.forced
                return

    def policy(self) -> frozenset[int]:
        """The outputs that hold the policy, as its delight was found."""
        call = self.call
        used = [o for o in call.observations if o.used_by(self.task)]
        seen = {s.output for o in used for s in (*o.sources, *o.parameters) if s.call is call}
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
                infinite = ~where.first(grad).flatten(1).isfinite().all(1) if grad.dim() > 1 else ~grad.isfinite()
                rows |= infinite.to(rows.device)
        return rows if rows.any() else None

    def of_samples(self, rows: Tensor) -> Tensor:
        """(N,) of samples from (B,) of rows: texts have what their row has."""
        return rows if self.texts is None else rows[self.texts.segments.row_of.to(rows.device)]

    def boundaries(self) -> list[Boundary]:
        """The outputs that the loss used, rows first."""
        call = self.call
        told: dict[int, Kind] = dict(call.log_probs)
        if call.named is not None:
            told = {call.named[1]: call.named[0]}
        return [
            Boundary(path, where.first(value), where.first(grad), told.get(i), i)
            for i, (path, where, value, grad) in enumerate(
                zip(call.paths, call.rows, call.outputs, self.grads, strict=True)
            )
            if grad is not None and where is not None and call.has_policy(i)
        ]

    def with_positions(self) -> tuple[int, dict[int, tuple[int, ...]]]:
        """How many positions the signal's output has, and the other outputs whose rows begin with an axis as long."""
        shapes = {
            i: tuple(where.first(self.call.outputs[i]).shape[1:])
            for i, (where, grad) in enumerate(zip(self.call.rows, self.grads, strict=True))
            if where is not None and grad is not None
        }
        own = shapes.pop(self.source, ()) if self.source is not None else ()
        length = own[0] if own else 1
        return length, {i: shape for i, shape in shapes.items() if length > 1 and shape[:1] == (length,)}

    def summed_over_positions(self) -> dict[int, tuple[int, ...]]:
        """Tensors that the model's own loss is made of beside the signal's, and that have lost the positions."""
        length, others = self.with_positions()
        call, known = self.call, {self.source, *others}
        return {
            i: tuple(where.first(call.outputs[i]).shape[1:])
            for i, (where, grad) in enumerate(zip(call.rows, self.grads, strict=True))
            if length > 1 and where is not None and grad is not None and call.makes_loss(i) and i not in known
        }

    def part(self, kept: Kept) -> Part | None:
        """The kept rows with their weighted gradients; None if no row is kept."""
        if not len(kept.rows):
            return None
        if self.texts is not None:
            used = (i for i, grad in enumerate(self.grads) if grad is not None)
            shifted = any(is_shifted(self.call, i, self.texts.segments) for i in used)
            return self._of_texts(Packed(self.texts, kept.rows, kept.factors, self.cuts, int(shifted)))
        part = self._take(to_device(kept.rows, self._device))
        if kept.factors is None:
            return part
        return part.weighted(to_device(kept.factors, self._device), self.offset, self.source, self.positions, self.cut)

    def stand_in(self) -> Part:
        """One row with a gradient of zero: parameters then get zero, as a masked loss gives them, not None."""
        if self.texts is not None:
            shortest = self.texts.segments.lengths.argmin().view(1)
            part = self._of_texts(Packed(self.texts, shortest, None))
            return (part if part.packed is None else cut(part, part.packed)).silenced()
        if self.held is not None:
            return self.held.select(torch.zeros(1, dtype=torch.long, device=self._device)).silenced()
        return Part.stand_in(self.call, torch.zeros(1, dtype=torch.long, device=self._device), self.grads)

    def _of_texts(self, packed: Packed) -> Part:
        """Texts of the call; all of its tokens where they cannot run alone."""
        grads = [self.forms.get(i, grad) for i, grad in enumerate(self.grads)]
        if self.call.whole is not None or self.call.scene.random:
            return whole_pack(self.call, packed, grads)
        return Part(self.call, torch.zeros(1, dtype=torch.long, device=self._device), grads, packed=packed)

    def condense(self) -> None:
        """Hold a pack's gradients in the form that they have, and let go of them and of the logits."""
        if self.keep_graph:
            return
        picked = self._picked()
        for i, (where, grad) in enumerate(zip(self.call.rows, self.grads, strict=True)):
            if where != Rows(0) or grad is None or grad.dim() != 3 or i in self.forms:
                continue
            if form := RankOne.of_picked(picked.get(i), grad) or RankOne.of_tokens(self.call.outputs[i], grad):
                self.forms[i] = form
                self.grads[i] = torch.zeros((), dtype=grad.dtype, device=grad.device).expand(grad.shape)
                self.call.forget(i)

    def _picked(self) -> dict[int, Picked]:
        """The log-probs that the loss picked, by output, where it takes nothing else from their logits."""
        return {
            o.output(self.call): o.picked
            for o in self.call.observations
            if o.alone and o.picked is not None and o.task == self.task
        }

    def some(self) -> Part | None:
        """Two rows that the loss sent a gradient to, or fewer; None if there are none."""
        used = torch.zeros(self.call.batch, dtype=torch.bool, device=self._device)
        for where, grad in zip(self.call.rows, self.grads, strict=True):
            if where is not None and grad is not None:
                used |= where.first(grad).reshape(self.call.batch, -1).ne(0).any(1).to(self._device)
        rows = used.nonzero().flatten()[:2]
        return self._take(rows) if len(rows) else None

    def hold(self, rows: Tensor, layout: Layout) -> None:
        """Keep these rows, at least one, and let go of the others and of the call's tensors."""
        rows = rows if len(rows) else rows.new_zeros(1)
        self.held = Part.holding(self.call, rows.to(self._device), self.grads, layout, self._picked())
        self.grads = [None] * len(self.grads)
        if not self.keep_graph:
            self.call.slim()

    def keep(self, positions: Tensor) -> None:
        """Of the rows that are held keep these, by position, at least one."""
        assert self.held is not None
        positions = positions if len(positions) else positions.new_zeros(1)
        self.held = self.held.select(to_device(positions, self._device))

    @property
    def _device(self) -> torch.device:
        return self.call.outputs[0].device

    def _take(self, rows: Tensor) -> Part:
        if self.held is not None:
            return self.held.select(torch.searchsorted(self.held.rows, rows))
        return Part.of(self.call, rows, self.grads)


def same_rows(a: Call, b: Call) -> bool:
    """Whether two calls were given the same rows: all that one was given of them, or one tensor that tells them apart.

    Masks of several batches are alike, too.
    """
    if a.batch != b.batch:
        return False
    mine, theirs = ([leaf for leaf, where in zip(c.inputs, next(c.readings()), strict=True) if where] for c in (a, b))
    if len(mine) > len(theirs):
        mine, theirs = theirs, mine
    if not mine:
        return False
    return any(
        _is_same_memory(x, y) and len(x.reshape(len(x), -1).unique(dim=0)) == len(x) for x in mine for y in theirs
    ) or all(any(same_values(x, y) for y in theirs if x.dtype == y.dtype and x.device == y.device) for x in mine)


def _is_same_memory(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() != 0 and (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride())


@dataclass(frozen=True)
class OutputProbe:
    """What one row of a call, run with a graph, told of its outputs.

    Attributes:
        graph: those that have a graph; the others are constants.
        selected: those that were picked from log-probs.
        seen: those that were looked at.
        bends: those that are terms of a loss and multiples of no log-prob.
    """

    graph: set[int]
    selected: set[int]
    seen: set[int]
    bends: dict[int, Bend]

    def is_constant(self, i: int) -> bool:
        """Whether no gradient can go through output ``i``."""
        return i in self.seen and i not in self.graph


def find_scales(
    paths: Sequence[Sequence[Sequence[Path]]], batches: Sequence[int], warn: WarnOnce
) -> Sequence[float | Tensor]:
    """The loss's own scale at each call; 1 / rows is assumed where the loss's graph did not tell.

    Where the loss takes several ways to a log-prob (a policy term and a KL term, say) the largest scale is taken for
    that of the policy: the other terms' coefficients are given relative to it, and are less than 1.

    A factor that multiplies one call's term of a sum is a weight of that call where the calls' factors make up for the
    sizes of their means, or are all the same; else it is an advantage (``loss = loss + R[t] * nll``).

    Args:
        paths: of each call, for each log-prob that its delight was read from, the loss's ways to it.
        batches: rows of each call.
        warn: told where it is ambiguous.
    """
    assumed = 1 / max(sum(batches), 1)
    if len(paths) == 1 and len(paths[0]) == 1 and len(paths[0][0]) == 1:
        return [scale_along(paths[0][0][0], assumed)]
    scales = iter(read_scales([path for call in paths for path in call]))
    found = []
    for call in paths:
        if not call:
            continue  # it has no delight to divide
        each = [next(scales) for _ in call]
        if any(one and not _alike([scale.product for scale in one], 1e-2) for one in each):
            warn(
                "scale",
                "gated: the loss reaches the log-prob by several terms of different scales (pg + 0.04 * kl?). Delight "
                "is in units of the largest; mark the log-prob inside the policy term alone with gate.logp(...).",
            )
        found.append(max((scale for one in each for scale in one), key=lambda scale: scale.product, default=None))
    known = [scale for scale in found if scale is not None]
    if len(known) < len(found) or not known:
        return [assumed * (known[0].above if known else 1.0)] * len(paths)
    weights = _alike([scale.product for scale in known]) or _alike([scale.below for scale in known])
    products = iter([scale.product if weights else scale.above * scale.reduction for scale in known])
    return [next(products) if call else 1.0 for call in paths]


def _alike(values: Sequence[float], tolerance: float = 1e-5) -> bool:
    return max(values) - min(values) <= tolerance * max(values)


def find_signal(
    arrival: Arrival,
    tokens: bool,
    probe: Callable[[Arrival], OutputProbe | None],
    warn: Callable[[float], None],
) -> tuple[Signal, int, list[list[Path]]]:
    """Delight of one call times the loss's own scale, and the position of its outputs where the signal starts.

    Taken from the first that applies: log-probs that were told, an output of the model, seen in the loss
    code, read off the boundary.

    Args:
        arrival: the call and its gradients.
        tokens: positions are chosen one by one, so it must be known which they are.
        probe: runs a row with a graph and tells how the outputs are made; None where it must not.
        warn: told how far the loss is from a policy gradient, when it was read off the boundary.

    Returns:
        A signal of (B, P), its offset, and for each log-prob that it was read from the loss's ways to it.
    """
    signals, offset, paths = _find(arrival, probe, warn)
    if tokens and (len(signals) > 1 or offset is None):
        raise DelightError(
            "gated: unit='token', and texts that are packed into rows, need one log-prob a token, in the order of the "
            "model's output (B, T, ...), but "
            + (f"the loss uses {len(signals)}" if len(signals) > 1 else "the loss takes it from other positions")
            + "; mark it with gate.logp(...), or leave unit='sample'"
        )
    signal = join(signals)
    device = arrival.call.outputs[0].device
    moved = Signal(signal.advantages.to(device), signal.surprisal.to(device), signal.valid.to(device))
    return moved, offset or 0, paths


def _find(
    arrival: Arrival, probe: Callable[[Arrival], OutputProbe | None], warn: Callable[[float], None]
) -> tuple[list[Signal], int | None, list[list[Path]]]:
    call = arrival.call
    used = [o for o in call.observations if o.used_by(arrival.task)]
    if told := [o for o in used if o.told]:
        arrival.source = told[0].output(call)
        return [o.signal(call) for o in told], told[0].offset(call), [o.paths for o in told]
    boundaries = arrival.boundaries()
    if any(out.field and not out.told for out in boundaries) and (probed := probe(arrival)) is not None:
        boundaries = [out for out in boundaries if out.told or not probed.is_constant(out.index)]
    if fields := selected_outputs(boundaries):
        arrival.source = fields[0].index
        return read_field(fields), _offset(fields[0]), _paths(call, fields)
    if call.named is not None:
        used = [o for o in used if o.is_of(call, call.named[1])]
    # A value picked from raw outputs may be a Q-value; a logit's gradients sum to zero over the actions.
    if seen := [o for o in used if not o.raw or any(o.is_of(call, b.index) and b.sums_to_zero() for b in boundaries)]:
        arrival.source = seen[0].output(call)
        return [o.signal(call) for o in seen], seen[0].offset(call), [o.paths for o in seen]
    if terms := [out for out in boundaries if call.is_summed(out.index)]:
        bends = {} if (probed := probe(arrival)) is None else probed.bends
        straight = [out for out in terms if out.index not in bends]
        if not straight or any(bends.get(out.index) == "ratio" for out in terms):
            raise DelightError(no_policy_in_terms(call.output_name(terms[0].index)))
        terms = straight
        arrival.source = terms[0].index
        return [read_terms(out) for out in terms], 0, _paths(call, terms)
    if boundaries and not any(bool(out.grad.any()) for out in boundaries):
        # All is clipped or masked, or no row is better than another: no delight, whatever the outputs are.
        first = boundaries[0]
        arrival.source = first.index
        nothing = torch.zeros(len(first.grad), 1, device=first.grad.device)
        return [Signal(nothing, nothing, nothing != 0)], 0, []

    def is_selected() -> bool:
        probed = probe(arrival)
        return probed is not None and boundaries[0].index in probed.selected

    found = find_policy(boundaries, is_selected)
    arrival.source = found[0][0].index
    signals, residual = read_policy(found)
    warn(residual)
    # Several terms reach logits, an entropy's too: that is no ambiguity of a log-prob.
    paths = [[path] for one in _paths(call, [out for out, _ in found]) for path in one]
    return signals, _offset(found[0][0]), paths


def _paths(call: Call, outputs: list[Boundary]) -> list[list[Path]]:
    return [call.loss_paths.get(out.index, []) for out in outputs]


def _offset(out: Boundary) -> int | None:
    return 0 if out.has_positions else None
