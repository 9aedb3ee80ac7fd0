"""The audit: a look that costs twice the kept rows, at the first decision of each structure and every so often.

A step's own comparison sees what shows in the values of the kept rows. It does not see rows that are tied behind a
factor that is still zero (LayerScale, LoRA's B, ReZero), nor a backward that depends on how many rows there are. So
some rows are run alone and once more in the company of as many others whose gradient is zero: the gradients of the
parameters have to be the same. And their values have to be the screen's also where their company was exchanged.

Rows that are cut after a position, and texts of a packed row, are looked at in the same way: without what follows them,
or stands around them, and with it.
"""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from kondo_hooks.core.arrival import Arrival
from kondo_hooks.core.call import Call
from kondo_hooks.core.engine import Engine
from kondo_hooks.core.kept_rows import Part, pack, reading, stands_alone
from kondo_hooks.core.packs import Packed, cut, whole_pack
from kondo_hooks.core.passes import as_in_screen
from kondo_hooks.core.passes import forward as run_checked
from kondo_hooks.core.positions import position_axis
from kondo_hooks.core.prefix import first_of
from kondo_hooks.core.readings import Learned
from kondo_hooks.core.replay import Replayed, run
from kondo_hooks.core.verify import verify_company
from kondo_hooks.errors import ReplayMismatchError
from kondo_hooks.rows.axes import Rows
from kondo_hooks.same.state import ModuleState

_ROWS = 64
# How far rounding carries a parameter's gradient, relative to its largest entry; and at most, if a control agrees.
_GRADIENT = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}
_MOST = {torch.float64: 1e-5, torch.float32: 1e-2, torch.float16: 0.3, torch.bfloat16: 0.5}
# What has passed, by the model: a context that is opened anew for every step need not look again.
_passed: "weakref.WeakKeyDictionary[nn.Module, set[Any]]" = weakref.WeakKeyDictionary()


class Audit:
    """Looks at the calls of a backward when a look is due.

    Args:
        model: what is gated.
        every: a look every so many decisions beside the first; None for the first alone, 0 for none.
    """

    def __init__(self, model: nn.Module, every: int | None):
        self.model = model
        self.every = every

    def __call__(
        self, arrivals: Sequence[Arrival], step: int, rate: float, engine: Engine, state: ModuleState, learned: Learned
    ) -> None:
        """Look at each structure that is new, or at all of them every so many decisions.

        Args:
            arrivals: calls of one backward, their signals found.
            step: decisions so far.
            rate: share of the rows that will be kept.
            engine: that runs the model.
            state: the model's.
            learned: where inputs keep their rows, by their paths; updated.

        Raises:
            ReplayMismatchError: if rows are tied. No gradient was changed.
        """
        if self.every == 0 or engine.ranks.tensor_parallel:
            return
        passed = _passed.setdefault(self.model, set())
        again = self.every is not None and step > 0 and step % self.every == 0
        structures: dict[Any, list[Arrival]] = {}
        for arrival in arrivals:
            kind = "texts" if arrival.texts is not None else "cut" if arrival.cut is not None else "rows"
            structures.setdefault((kind, *_structure(arrival.call)), []).append(arrival)
        for structure, alike in structures.items():
            if alike[0].call.whole or (structure in passed and not again):
                continue
            if structure[0] != "rows":
                # Where passes communicate each replay is held against the screen, and what is still zero is not seen.
                can = engine.takes_gradients and not engine.communicates
                with engine.one_pass(False):
                    nothing = can and _compare_cut(alike[0], state, learned) is False
                if structure[0] == "texts" or nothing:
                    passed.update([] if nothing else [structure])
                    continue
            with engine.one_pass(False):
                if engine.communicates:
                    _compare_values(alike[0], rate, learned)
                    looked: bool | None = True
                else:
                    looked = _compare_gradients(alike, rate, state if engine.takes_gradients else None, learned)
            if looked:
                passed.add(structure)
            elif looked is None:
                for arrival in alike:  # what was not looked at runs as it ran
                    arrival.call.whole = "which axis of an input holds the rows cannot be told"


def _structure(call: Call) -> Any:
    """What calls have in common that one look covers: alike on all ranks, so without sizes."""
    return (*call.input_paths, *call.paths, *call.scene.flags[0][:1], hash(call.scene.flags[1]))


def _compare_values(arrival: Arrival, rate: float, learned: Learned) -> None:
    """Where every rank has to make the same passes: one run, whatever this rank has."""
    call = arrival.call
    kept = _pick(arrival, rate)[0]
    if not len(kept) or len(kept) == call.batch:
        call.run_without_graph(call.inputs)
        return
    part = _part(arrival, kept)
    outputs = {i: t for i, (t, g) in enumerate(zip(call.outputs, part.grads, strict=True)) if g is not None}
    verify_company(Replayed([part], [], [], [], outputs, reading(part, learned)))


def _compare_gradients(
    arrivals: list[Arrival], rate: float, state: ModuleState | None, learned: Learned
) -> bool | None:
    """Run some rows alone and in company; False if there was nothing to look at, None if they do not run alone."""
    return _compare_picked(_alone_and_in_company(arrivals, rate), state, learned)


def _compare_cut(arrival: Arrival, state: ModuleState, learned: Learned) -> bool | None:
    """Run the first positions of some rows, or one text of a row, alone and with what follows or stands around it.

    Returns:
        False if there was nothing to look at.
    """
    picked = _last_text(arrival) if arrival.texts is not None else _first_positions(arrival)
    return _compare_picked(picked, state, learned)


def _compare_picked(
    picked: tuple[list[Part], list[Part]] | None, state: ModuleState | None, learned: Learned
) -> bool | None:
    """What runs alone, and what in company; False if that is nothing, None if it does not run alone."""
    if picked is None:
        return False
    with _no_reentrant_checkpoints():
        return _compare_groups(*picked, state, learned)


def _last_text(arrival: Arrival) -> tuple[list[Part], list[Part]] | None:
    """The last text that has a gradient, and the same in its row beside others whose gradient is zero."""
    assert arrival.texts is not None
    live = [
        arrival.texts.segments.by_token_any(grad)
        for grad, where in zip(arrival.grads, arrival.call.rows, strict=True)
        if grad is not None and where == Rows(0) and grad.dim() > 1
    ]
    texts = torch.stack(live).any(0).nonzero().flatten() if live else torch.empty(0, device="cpu")
    if not len(texts) or len(arrival.texts) < 2 or arrival.call.scene.random:
        return None
    packed = Packed(arrival.texts, texts[-1:], None)
    part = Part(arrival.call, torch.zeros(1, dtype=torch.long, device="cpu"), list(arrival.grads), packed=packed)
    return [cut(part, packed)], [whole_pack(arrival.call, packed, arrival.grads)]


def _first_positions(arrival: Arrival) -> tuple[list[Part], list[Part]] | None:
    """Some rows as far as half of the gradient, and the same rows whole with a gradient of zero beyond."""
    positions, some = arrival.cut, arrival.some()
    if positions is None or some is None or some.held is not None:
        return None
    used = [i for i in positions.outputs if isinstance(some.grads[i], Tensor)]
    live = torch.zeros(positions.length, dtype=torch.bool, device=some.rows.device)
    for i in used:
        grad = some.grads[i]
        assert isinstance(grad, Tensor)
        live |= grad.movedim(position_axis(arrival.call.rows[i] or Rows(0)), 0).flatten(1).ne(0).any(1)
    places = live.nonzero().flatten()
    length = int(places[(len(places) - 1) // 2]) + 1 if len(places) else positions.length
    if length >= positions.length:
        return None
    keep = torch.arange(positions.length, device=some.rows.device) < length
    grads = list(some.grads)
    for i in used:
        grad = some.grads[i]
        assert isinstance(grad, Tensor)
        axis = position_axis(arrival.call.rows[i] or Rows(0))
        shape = [-1 if a == axis else 1 for a in range(grad.dim())]
        grads[i] = grad * keep.to(grad.dtype).view(shape)
    whole = replace(some, grads=grads, positions=positions)
    return [first_of(whole, length)], [whole]


def _compare_groups(alone: list[Part], company: list[Part], state: ModuleState | None, learned: Learned) -> bool | None:
    done = run_checked(alone, learned)
    if len(done) != 1 or done[0].layout is None:
        return None
    if list(map(len, done[0].group)) != list(map(len, alone)) and not done[0].group[0].repeated:
        return None  # all rows ran
    verify_company(done[0])
    parameters = [] if state is None else [p for p in state.parameters() if p.requires_grad]
    if state is None or not parameters:
        return True
    theirs = _gradients(run(company, done[0].layout), parameters)
    ours = _gradients(done[0], parameters)
    if theirs is None or ours is None:
        return True
    if not all(g is None or bool(g.isfinite().all()) for g in ours):
        return False  # a loss scaled too high: the next decision tells
    dtype = alone[0].call.scene.autocast.lowest(next(iter(done[0].all_outputs.values())))
    apart, worst = _distance(ours, theirs)
    if apart <= _GRADIENT[dtype]:
        return True
    if apart <= _MOST[dtype] and (copies := _in_company_of_copies(alone)) is not None:
        # Copies make a batch of the same size, but tie no other rows in: rounding is the same there.
        other = _gradients(run(copies, done[0].layout), parameters)
        if other is not None and _distance(other, theirs)[0] <= 0.5 * apart:
            return True
    if alone[0].is_cut or alone[0].texts is not None:
        beside = "the positions that follow" if alone[0].is_cut else "the other texts of their row"
        raise ReplayMismatchError(
            f"gated: the gradient of {state.name_of(parameters[worst])} is not the same without {beside}: it is off by "
            f"{apart:.2g} of its largest entry, while the outputs agree. A layer ties them behind a factor that is "
            "still zero. Use "
            + ("unit='token'" if alone[0].is_cut else "one text a row")
            + "; audit=0 switches this look off. No gradient was changed."
        )
    raise ReplayMismatchError(
        f"gated: the gradient of {state.name_of(parameters[worst])} is not the same for {sum(map(len, alone))} rows "
        f"alone as in the company of {sum(map(len, company)) - sum(map(len, alone))} others whose gradient is zero: it "
        f"is off by {apart:.2g} of its largest entry, while the outputs agree. Rows are tied behind a factor that is "
        "still zero (LayerScale, ReZero, LoRA), a backward depends on the number of rows, or random numbers come from "
        "outside torch. Make the layer work row by row, or gate a part of the model that does; audit=0 switches this "
        "look off. No gradient was changed."
    )


def _alone_and_in_company(arrivals: list[Arrival], rate: float) -> tuple[list[Part], list[Part]] | None:
    """Two groups of one pass each: some rows, and the same rows beside others whose gradient is zero."""
    largest = max(arrivals, key=lambda a: a.call.batch)
    kept, others = _pick(largest, rate)
    if len(kept) and len(others):
        # Others before and after them: rows may be tied to the first or the last. Not all rows of the batch, whose
        # random numbers would be drawn in the batch's order.
        if len(kept) + len(others) == largest.call.batch:
            others = others[:-1] if len(others) > 1 else others
        half = (len(others) + 1) // 2
        rows = torch.cat([others[:half], kept, others[half:]])
        if len(rows) == largest.call.batch:
            rows = rows.sort().values
        weights = torch.isin(rows, kept).to(torch.float32)
        return [_part(largest, kept)], [_part(largest, rows).weighted(weights, 0)]
    # An episode of calls of one row: other calls are the company.
    live = [a for a in arrivals if not stands_alone(a.call) and len(_pick(a, rate)[0])][: 2 * _ROWS]
    if len(live) < 2:
        return None
    parts = [_part(a, _pick(a, rate)[0]) for a in live]
    half = len(parts) // 2
    groups = pack([*parts[:half], *(part.silenced() for part in parts[half:])])
    return (parts[:half], groups[0]) if len(groups) == 1 else None


def _pick(arrival: Arrival, rate: float) -> tuple[Tensor, Tensor]:
    """The rows of largest gradient, and as many others."""
    call = arrival.call
    size = torch.zeros(call.batch, device=call.outputs[0].device)
    for i, (where, grad) in enumerate(zip(call.rows, arrival.grads, strict=True)):
        if where is not None and grad is not None and not call.is_shared(i):
            rows = where.first(grad).detach()
            size += rows.abs().reshape(len(rows), -1).amax(1).to(size)
    live = int((size.isfinite() & (size > 0)).sum())
    count = min(live, max(1, call.batch // 2), max(1, round(rate * call.batch)), _ROWS)
    order = size.nan_to_num(0, posinf=0).sort(descending=True).indices
    return order[:count].sort().values, order[count : count + max(count, 2)].sort().values


def _part(arrival: Arrival, rows: Tensor) -> Part:
    call = arrival.call
    return Part.of(call, rows, [None if call.is_shared(i) else grad for i, grad in enumerate(arrival.grads)])


def _in_company_of_copies(alone: list[Part]) -> list[Part] | None:
    if alone[0].is_cut or alone[0].texts is not None:
        return None
    if len(alone) > 1:
        return [*alone, *(part.silenced() for part in alone)]
    n = len(alone[0])
    index = torch.arange(2 * n, device=alone[0].rows.device) % n
    weights = (torch.arange(2 * n, device=index.device) < n).to(torch.float32)
    return [alone[0].repeat(index).weighted(weights, 0)]


def _gradients(replayed: Replayed, parameters: list[nn.Parameter]) -> list[Tensor | None] | None:
    """Of the parameters, from a pass's graph; None where that has a part which ``autograd.grad`` cannot go through."""
    if not replayed.outputs or _has_reentrant_checkpoint(replayed.outputs):
        return None
    with as_in_screen([replayed]):
        grads = torch.autograd.grad(replayed.outputs, parameters, replayed.grads, allow_unused=True)
    return [g if g is None or not g.is_sparse else g.to_dense() for g in grads]


@contextlib.contextmanager
def _no_reentrant_checkpoints() -> Iterator[None]:
    """Run what torch would checkpoint reentrantly as it is: ``autograd.grad`` cannot go through such a checkpoint."""
    unchecked: Any = staticmethod(lambda function, _preserve, *args: function(*args))
    setattr(CheckpointFunction, "apply", unchecked)  # noqa: B010 - inherited, and so deleted below
    try:
        yield
    finally:
        delattr(CheckpointFunction, "apply")


def _has_reentrant_checkpoint(outputs: Sequence[Tensor]) -> bool:
    stack, seen = [output.grad_fn for output in outputs], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            if node.name() == "CheckpointFunctionBackward":
                return True
            seen.add(node)
            stack.extend(parent for parent, _ in node.next_functions)
    return False


def _distance(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> tuple[float, int]:
    """The largest difference of a parameter's two gradients, relative to its largest entry, and which parameter's.

    A gradient that vanishes but for rounding (the bias of attention's keys) is held against the model's largest.
    """
    pairs = list(zip(ours, theirs, strict=True))
    size = [
        max((float(g.nan_to_num(0, 0, 0).abs().max()) for g in pair if g is not None), default=0.0) for pair in pairs
    ]
    floor = 1e-3 * max(size, default=0.0)
    apart = [
        # Zero times what others' rows overflow to is NaN, and none of these rows' gradient.
        0.0 if a is None or b is None else float((a - b).abs().nan_to_num(0, 0, 0).max()) / max(s, floor, 1e-30)
        for (a, b), s in zip(pairs, size, strict=True)
    ]
    worst = max(range(len(apart)), key=apart.__getitem__)
    return apart[worst], worst
