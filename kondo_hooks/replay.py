"""The replay: kept rows run again, with a graph, and checked against what the screen returned for them."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kondo_hooks.batch import Layout, Rows, Tree, candidate_rows, fits, flatten, is_doubtful, layouts, unflatten
from kondo_hooks.draws import TakeDraws
from kondo_hooks.errors import ReplayMismatchError
from kondo_hooks.node import Call, differentiable


@dataclass
class Part:
    """Rows of a call that are to be replayed, and the gradient at each output's rows."""

    call: Call
    rows: Tensor
    grads: list[Tensor | None]

    @classmethod
    def silent(cls, call: Call, rows: Tensor, like: Sequence[Tensor | None]) -> "Part":
        """Rows with a gradient of zero at every output that has rows and that ``like`` has a tensor for."""
        zeros = [
            None if full is None or where is None else where.take(full, rows).zero_()
            for where, full in zip(call.rows, like, strict=True)
        ]
        return cls(call, rows, zeros)

    def whole(self) -> "Part":
        """The whole call, with a gradient of zero at the rows that were not in this part."""
        grads: list[Tensor | None] = []
        for output, where, grad in zip(self.call.outputs, self.call.rows, self.grads, strict=True):
            if grad is None or where is None:
                grads.append(None)
            else:
                grads.append(where.put(torch.zeros_like(output, dtype=grad.dtype), self.rows, grad))
        return Part(self.call, torch.arange(self.call.batch, device=self.rows.device), grads)

    @property
    def all_rows(self) -> bool:
        """Whether it is the whole call."""
        return len(self.rows) == self.call.batch


@dataclass
class Replayed:
    """A replay of parts: outputs, their gradients, and the leaves that stand for inputs wanting a gradient."""

    group: list[Part]
    outputs: list[Tensor]
    grads: list[Tensor]
    leaves: list[tuple[Tensor, Rows | None]]


def pack(parts: list[Part]) -> list[list[Part]]:
    """Group parts whose rows can go through the model as one batch."""
    groups: list[list[Part]] = []
    for part in parts:
        for group in groups:
            if _fits(group[0].call, part.call):
                group.append(part)
                break
        else:
            groups.append([part])
    return groups


def _fits(a: Call, b: Call) -> bool:
    if any(c.random or c.whole or c.buffers.entries or c.decides_at_once for c in (a, b)) or a.run != b.run:
        return False
    if a.input_paths != b.input_paths or a.flags != b.flags or a.autocast != b.autocast:
        return False
    first, second = (next(layouts(c.inputs, c.batch, c.batch_dim)) for c in (a, b))
    if first != second or a.rows != b.rows:
        return False
    for x, y, rows in zip(a.inputs, b.inputs, first, strict=True):
        if x.dtype != y.dtype or x.device != y.device or x.dim() != y.dim():
            return False
        if rows is None:
            if x is not y and not torch.equal(x, y):
                return False
        elif _without(x.shape, rows.axis) != _without(y.shape, rows.axis):
            return False
    return _same_constants(a.args, b.args)


def _without(shape: torch.Size, axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _same_constants(a: Tree, b: Tree) -> bool:
    """Whether two trees differ in nothing but their tensors."""
    if a is b or (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same_constants, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same_constants(a[key], b[key]) for key in a)
    try:
        return bool(a == b)
    except Exception:
        return False


def replay(group: list[Part], learned: dict[tuple[str, ...], Layout]) -> Replayed:
    """Run the rows of one group again with a graph, and check them against the screen.

    Args:
        group: parts that ``pack`` put together.
        learned: by the inputs' paths, which reading of their batch axes reproduced a screen; updated.

    Raises:
        ReplayMismatchError: if no reading does.
    """
    call = group[0].call
    if (cause := call.changed_since()) is not None:
        raise ReplayMismatchError(f"gated: {cause}: the kept rows cannot be replayed. Clone it first.")
    key = tuple(call.input_paths)
    readings = list(layouts(call.inputs, call.batch, call.batch_dim))
    everything = len(group) == 1 and group[0].all_rows
    known = learned.get(key)
    if everything:
        readings = readings[:1]
    elif known is not None and fits(known, call.inputs, call.batch):
        readings.insert(0, known)
    failure: Exception | None = None
    for layout in readings:
        try:
            replayed = _run(group, layout)
            _verify(group, replayed[1])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            failure = failure or error
            continue
        if not everything and known != layout:
            if _another_fits(group, layout, readings):
                raise AmbiguousRowsError
            learned[key] = layout
        return replayed[0]
    assert failure is not None
    raise failure


class AmbiguousRowsError(Exception):
    """Two readings of which input holds rows reproduce the screen: only the whole batch is sure to be right."""


def _another_fits(group: list[Part], layout: Layout, readings: list[Layout]) -> bool:
    """Whether a doubtful input could be read otherwise: a zero-initialised path hides what is wrong."""
    call = group[0].call
    doubtful = [is_doubtful(candidate_rows(leaf, call.batch, call.batch_dim), call.batch_dim) for leaf in call.inputs]
    for other in readings:
        differs = [i for i, (a, b) in enumerate(zip(layout, other, strict=True)) if a != b]
        if len(differs) == 1 and doubtful[differs[0]] and any(other):
            try:
                _verify(group, _run(group, other)[1])
            except (RuntimeError, ValueError, IndexError):
                continue
            return True
    return False


def _run(group: list[Part], layout: Layout) -> tuple[Replayed, list[Tensor]]:
    call = group[0].call
    leaves: list[tuple[Tensor, Rows | None]] = []
    inputs = []
    for i, rows in enumerate(layout):
        taken = group[0].call.inputs[i].detach()
        if rows is not None and not (len(group) == 1 and group[0].all_rows):
            taken = torch.cat(
                [rows.take(part.call.inputs[i].detach(), part.rows.to(taken.device)) for part in group],
                rows.axis,
            )
        if call.inputs[i].requires_grad:
            taken.requires_grad_()
            leaves.append((taken, rows))
        inputs.append(taken)
    args, kwargs = unflatten(call.args, inputs)
    with call.as_screened(), torch.enable_grad(), taking_draws(group):
        result = call.run(*args, **kwargs)
    outputs = [leaf for leaf in flatten(result)[1] if differentiable(leaf)]
    if len(outputs) != len(call.outputs):
        raise ReplayMismatchError(
            f"gated: the model returned {len(call.outputs)} tensors for the whole batch but {len(outputs)} for "
            "the kept rows; its output must not depend on how many rows it gets"
        )
    used: list[tuple[Tensor, Tensor]] = []
    for i, output in enumerate(outputs):
        grads = [part.grads[i] for part in group]
        if all(grad is None for grad in grads) or not output.requires_grad:
            continue
        where = call.rows[i]
        assert where is not None
        filled = [
            where.take(part.call.outputs[i].detach(), part.rows).zero_() if grad is None else grad
            for part, grad in zip(group, grads, strict=True)
        ]
        used.append((output, filled[0] if len(filled) == 1 else torch.cat(filled, where.axis)))
    replayed = Replayed(group, [o for o, _ in used], [g for _, g in used], leaves)
    return replayed, outputs


@contextlib.contextmanager
def taking_draws(group: Iterable[Part]) -> Iterator[None]:
    """Hand out the rows' share of the random numbers that the screen drew."""
    calls = [(p.call.draws, p.call.batch, p.rows) for p in group if p.call.draws.shapes and not p.all_rows]
    if not calls:
        yield
        return
    with TakeDraws(calls):
        yield


def _verify(group: list[Part], outputs: list[Tensor]) -> None:
    call = group[0].call
    for i, output in enumerate(outputs):
        if all(part.grads[i] is None for part in group):
            continue
        where = call.rows[i]
        assert where is not None
        screen = torch.cat([where.take(part.call.outputs[i], part.rows) for part in group], where.axis)
        name = f"output {call.paths[i]}" if call.paths[i] else "the output"
        if screen.shape != output.shape:
            raise ReplayMismatchError(
                f"gated: for the kept rows {name} has shape {tuple(output.shape)} where {tuple(screen.shape)} was "
                "expected: rows were taken on the wrong axis. Name the batch axis with batch_dim=."
            )
        difference, magnitude = largest_difference(screen, output.detach())
        if not difference <= call.autocast.tolerance(output) * max(magnitude, 1e-30):
            raise ReplayMismatchError(
                f"gated: replaying {sum(len(p.rows) for p in group)} of {sum(p.call.batch for p in group)} rows "
                f"changed {name} by up to {difference:.3g} (its largest value is {magnitude:.3g}): in this model a "
                "row's output depends on the other rows of the batch, or the model is not deterministic. Likely: "
                "normalisation or attention over the batch axis, state that a forward updates, randomness from "
                "outside torch, inputs that are no tensors (arrays, objects of your own: they are not cut into rows), "
                "or a batch axis that is not the first one (then name it with batch_dim=). Make "
                "the layer work row by row, or gate a part of the model that does. No gradient was changed."
            )


def input_grads(replayed: Replayed) -> list[Tensor | None]:
    """Gradients of the inputs that want one, in full size: zero at the rows that were not replayed."""
    part = replayed.group[0]
    wanting = [leaf for leaf in part.call.inputs if leaf.requires_grad]
    full: list[Tensor | None] = []
    for like, (leaf, where) in zip(wanting, replayed.leaves, strict=True):
        if leaf.grad is None or where is None or part.all_rows:
            full.append(leaf.grad)
        else:
            full.append(where.put(torch.zeros_like(like), part.rows.to(like.device), leaf.grad))
    return full


def largest_difference(screen: Tensor, replay: Tensor) -> tuple[float, float]:
    """Largest absolute difference of two tensors of one shape, and the magnitude to hold it against.

    NaN equals NaN. A few values far above the rest (an action masked with -1e9) are no measure for the others.
    """
    if not screen.numel():
        return 0.0, 0.0
    apart, size = (screen - replay).abs(), screen.abs()
    difference, magnitude = torch.stack([apart.max(), size.max()]).tolist()
    if difference == 0 or magnitude <= _ORDINARY:
        return difference, magnitude
    same = (screen == replay) | (screen.isnan() & replay.isnan())
    ordinary = size.isfinite() & (size <= _ORDINARY * size[~same].median())
    difference = float(apart.masked_fill(same, 0).max())
    return difference, float(size[ordinary].max()) if ordinary.any() else 0.0


_ORDINARY = 1e4
