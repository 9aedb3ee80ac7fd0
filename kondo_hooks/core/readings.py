"""Where inputs and outputs keep their rows, as far as shapes leave it in doubt: found out by running the model.

A shared input whose size happens to be the batch's looks like rows, and so does the time axis of (T, B, K) outputs
where T is the batch size. Inputs are told apart by replays, which reproduce the screen or do not. Outputs are told
apart by one more run of fewer rows.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kondo_hooks.core.call import Call, differentiable
from kondo_hooks.errors import WarnOnce, rows_not_in_blocks, unknown_axis
from kondo_hooks.rows.axes import Layout, Rows, blocks, fits, layouts, rows_between
from kondo_hooks.rows.tree import flatten
from kondo_hooks.same.scene import no_fast_path, uncompiled
from kondo_hooks.same.state import Autocast, forked_rng
from kondo_hooks.same.uses import Uses

Key = tuple[str, ...]
_LONGEST_WAIT = 64


@dataclass
class Learned:
    """What replays have found out about where inputs keep their rows, by the inputs' paths.

    Attributes:
        warn: for what stays in doubt.
        layouts: which reading reproduced a screen, and no other did.
        positions: where calls that were decided on before the forward keep their positions.
        constant_lists: lists in outputs that are as long whatever the number of rows, by their and the inputs' paths.
    """

    warn: WarnOnce = field(default_factory=WarnOnce)
    layouts: dict[Key, Layout] = field(default_factory=dict)
    positions: dict[Key, Any] = field(default_factory=dict)
    constant_lists: set[Key] = field(default_factory=set)
    _waits: dict[Any, tuple[int, int]] = field(default_factory=dict)

    def known(self, call: Call, batch: int | None = None) -> Layout | None:
        """How a call's inputs are to be read; None if no replay has told, or they do not fit what it told."""
        layout = self.layouts.get(tuple(call.input_paths))
        return layout if layout is not None and fits(layout, call.inputs, batch or call.batch) else None

    def learn(self, call: Call, layout: Layout) -> None:
        """Read the inputs of such calls by ``layout`` from now on."""
        self.layouts[tuple(call.input_paths)] = layout

    def doubt(self, call: Call, i: int) -> None:
        """Two readings of input ``i`` reproduce the screen: look again later, after a growing number of replays."""
        _, longest = self._waits.get(_shaped(call), (0, 1))
        self._waits[_shaped(call)] = (longest, min(2 * longest, _LONGEST_WAIT))
        self.warn(
            "ambiguous",
            f"gated: which axis of the input {call.input_name(i)} {tuple(call.inputs[i].shape)} holds the rows, if "
            f"any, cannot be told: two readings give the same {call.batch} rows (a path that is zero at first?). All "
            "rows are replayed until it can, which is exact and saves nothing. Call the model on a batch of another "
            "size, or leave the input out where it is not used.",
        )

    def waits(self, call: Call) -> bool:
        """Whether such a call is still in doubt, and it is not yet time to look again."""
        left, longest = self._waits.get(_shaped(call), (0, 0))
        if not left:
            return False
        self._waits[_shaped(call)] = (left - 1, longest)
        return True


def _shaped(call: Call) -> Any:
    return tuple(call.input_paths), tuple(leaf.shape for leaf in call.inputs)


def sizes_of_inputs(call: Call) -> list[int]:
    """The sizes that the inputs of a call have on ``batch_dim``, one of which is the number of rows."""
    return list(dict.fromkeys(leaf.shape[call.batch_dim] for leaf in call.arguments if leaf.dim() > call.batch_dim))


def find_anchor(call: Call) -> int | None:
    """An input whose size on ``batch_dim`` is the number of rows, as a run of the last shows; None if none is found.

    Most tensors of a call may have another size there: the layers of a recurrent state, the positions of a mask.
    """
    axis, each = call.batch_dim, 2 if call.pairs else 1
    training, requires_grad = call.scene.flags
    flags = (False,) * len(training), requires_grad
    sizes = sizes_of_inputs(call)
    if sizes[0] == each > 1:
        return None  # a single pair, which no run of fewer rows can tell
    full = _outputs(call, call.inputs, flags, everything=True)
    batches = [size // each for size in sizes if size >= 2 * each and size % each == 0] if full else []
    # What a model reads in the likeliest way for one number of rows is rarely its rows for another.
    likeliest = [(batch, next(layouts(call.inputs, batch, axis, call.pairs))) for batch in batches]
    others = [(batch, layout) for batch in batches for layout in layouts(call.inputs, batch, axis, call.pairs)]
    for batch, layout in (*likeliest, *others):
        if (anchor := _anchor(call, layout, flags, full or [], batch)) is not None:
            return anchor
    return None


def _anchor(call: Call, layout: Layout, flags: Any, full: list[Tensor], batch: int) -> int | None:
    """The first input with rows on ``batch_dim`` that the model uses, if it runs on the last of so many rows."""
    last = torch.tensor([batch - 1], device="cpu")
    taken = [leaf if where is None else where.take(leaf, last) for leaf, where in zip(call.inputs, layout, strict=True)]
    there = [i for i, where in enumerate(layout) if where is not None and where.axis == call.batch_dim]
    with uncompiled():
        uses = Uses(*(taken[i] for i in there))
        part = _outputs(call, taken, flags, uses, everything=True)
    used = [i for i, found in zip(there, uses.each, strict=True) if found]
    return used[0] if part is not None and used and has_rows(full, part, batch, call.parts) else None


def has_rows(full: Sequence[Tensor], part: Sequence[Tensor], batch: int, parts: int) -> bool:
    """Whether every output changes with the number of rows, but for constants, and the last row stays as it is."""
    several, last = 0, torch.tensor([batch - 1], device="cpu")
    for a, b in zip(full, part, strict=False):
        where = rows_between(a.shape, b.shape, batch, 1, parts)
        if where is None and a.shape != b.shape:
            return False
        if where is not None:
            several += 1
            if not _alike(where.take(a, last), b):
                return False
    return several > 0


def settle_outputs(call: Call, settled: dict[str, Rows], unchecked: bool, warn: WarnOnce, alone: bool) -> None:
    """Find out where outputs keep their rows whose shapes leave it in doubt, and no replay will tell.

    Args:
        call: screened; its ``rows`` are put right.
        settled: what was found for other calls, by path and number of axes; updated.
        unchecked: rows may be weighted of which no replay of fewer rows is held against the screen.
        warn: for what stays in doubt.
        alone: whether this rank may run the model on its own.

    Raises:
        ValueError: if rows are flattened into another axis otherwise than in blocks, or that cannot be told.
    """
    rows = [i for i, where in enumerate(call.rows) if where is not None]
    keys = {i: f"{call.paths[i]} {call.outputs[i].dim()}" for i in rows}
    doubtful = [i for i in rows if keys[i] not in settled and _is_doubtful(call, i, unchecked, alone)]
    if doubtful:
        found = _look(call) if alone else None
        # Where ranks have to make the same passes the replay tells, if it is of fewer rows: by an error.
        for i in doubtful if alone or unchecked else ():
            if found is None or (where := found.get(call.paths[i])) is None:
                _stay_in_doubt(call, i, warn)
            elif isinstance(where, ValueError):
                raise where
            else:
                settled[keys[i]] = where
    for i in rows:
        where = settled.get(keys[i])
        if where is not None and call.outputs[i].shape[where.axis] % call.batch == 0:
            call.rows[i] = blocks(where.axis, call.outputs[i].shape[where.axis] // call.batch, call.parts)


def _is_doubtful(call: Call, i: int, unchecked: bool, alone: bool) -> bool:
    where, shape, each = call.rows[i], call.outputs[i].shape, 2 if call.pairs else 1
    assert where is not None
    if call.batch == 1 or (call.makes_loss(i) and not unchecked):
        return False
    if where.axis == 1 and len(shape) == 2 and unchecked and shape[0] % call.size == 0:
        return True  # (T * B, K) with K = B, of a time-first model
    return list(shape).count(call.size) > 1 or (where.repeat > each and (unchecked or alone))


def _stay_in_doubt(call: Call, i: int, warn: WarnOnce) -> None:
    where, shape = call.rows[i], tuple(call.outputs[i].shape)
    assert where is not None
    warn("axis", unknown_axis(call.output_name(i), shape, call.batch, where.axis))


def find_positions(call: Call, outputs: Sequence[int], source: int, length: int) -> dict[int, bool]:
    """Whether outputs have positions or as many features by chance: these stay when the inputs lose a position.

    Args:
        call: screened.
        outputs: whose rows' first axis is as long as there are positions.
        source: the output that the positions were read from.
        length: their number.

    Returns:
        By output; nothing where the model does not run on fewer positions, or another axis has them.
    """
    n, shortened, inputs = min(2, call.batch), False, []
    for leaf, where in zip(call.inputs, next(call.readings()), strict=True):
        taken = leaf if where is None else where.take(leaf, torch.arange(n, device=leaf.device))
        for axis, size in enumerate(taken.shape):
            if size == length and (where is None or axis != where.axis):
                taken, shortened = taken.narrow(axis, 0, length - 1), True
        inputs.append(taken)
    part = run_rows(call, inputs) if shortened else None
    if part is None:
        return {}
    found: dict[int, bool] = {}
    for i in (source, *outputs):
        if i >= len(part) or (where := call.rows[i]) is None:
            continue
        rows = part[i].movedim(where.axis, 0)
        shape = rows.shape[1:] if where.repeat == 1 else torch.Size([len(rows) // n, *rows.shape[1:]])
        full = where.first(call.outputs[i]).shape[1:]
        if (
            len(rows) % n == 0
            and len(shape) == len(full)
            and (shape == full or shape == torch.Size([length - 1, *full[1:]]))
        ):
            found[i] = shape != full
    return found if found.pop(source, False) else {}


def run_rows(call: Call, inputs: Sequence[Tensor], autocast: Autocast | None = None) -> list[Tensor] | None:
    """A call's outputs for other inputs, in eval mode and without a graph; None if the model does not run on them."""
    training, requires_grad = call.scene.flags
    before, call.scene.autocast = call.scene.autocast, autocast or call.scene.autocast
    try:
        return _outputs(call, inputs, ((False,) * len(training), requires_grad))
    finally:
        call.scene.autocast = before


Found = dict[str, Rows | ValueError | None]


def _look(call: Call) -> Found | None:
    """Where outputs keep their rows, by path, from a run of two rows; None if the model does not run on two."""
    n = 2 if call.batch > 2 else 1
    training, requires_grad = call.scene.flags
    # In eval mode rows are independent where they are not in training; some models return something else there.
    for flags in (((False,) * len(training), requires_grad), call.scene.flags):
        full = _outputs(call, call.inputs, flags)
        if full is None or any(a.shape != b.shape for a, b in zip(full, call.outputs, strict=False)):
            continue
        # A model may run on columns as well as on rows: those where they are expected come first.
        for layout in sorted(filter(any, call.readings()), key=lambda layout: _unexpected(call, layout)):
            taken = [
                leaf if where is None else where.take(leaf, torch.arange(n, device=leaf.device))
                for leaf, where in zip(call.inputs, layout, strict=True)
            ]
            part = _outputs(call, taken, flags)
            if part is not None:
                return {call.paths[i]: _place(call, i, full[i], part[i], n) for i in range(len(full))}
    return None


def _unexpected(call: Call, layout: Layout) -> int:
    """How many inputs a reading takes rows from on another axis than ``batch_dim``."""
    return sum(rows is not None and rows.axis != call.batch_dim for rows in layout)


def _place(call: Call, i: int, full: Tensor, part: Tensor, n: int) -> Rows | ValueError | None:
    where = rows_between(full.shape, part.shape, call.batch, n, call.parts)
    if where is None or where.repeat <= (2 if call.pairs else 1):
        return where
    first = torch.arange(n, device=full.device)
    if _alike(where.take(full, first), part):
        return where
    return ValueError(rows_not_in_blocks(call.output_name(i), tuple(full.shape), call.batch))


def _alike(a: Tensor, b: Tensor) -> bool:
    largest = float(a.abs().amax()) if a.numel() else 0.0
    return bool(((a - b).abs() <= 2e-2 * largest).all()) or not a.isfinite().all()


def _outputs(
    call: Call, inputs: Sequence[Tensor], flags: Any, uses: Uses | None = None, everything: bool = False
) -> list[Tensor] | None:
    """What the model returns for inputs, without a graph or a trace; None if it raises, or returns something else.

    Args:
        call: that was screened.
        inputs: others in place of its own.
        flags: of the modules.
        uses: notes what the model uses.
        everything: all tensors that it returns as they are, instead of the call's outputs.
    """
    state = call.state
    given = [leaf.detach() for leaf in inputs]
    with (
        torch.no_grad(),
        no_fast_path(),
        call.scene.autocast.restored(),
        forked_rng(call.scene.rng),
        call.scene.attributes_again(call.states(inputs)),
        state.restored_flags(flags),
        state.untouched(),
    ):
        try:
            tape = None if everything else call.tape()
            with uses or contextlib.nullcontext(), tape or contextlib.nullcontext():
                result, args = call.run_again(given)
            left = call.scene.left()
            if everything:
                tensors = [*flatten(result)[1], *left.values()]
                return [tensor for tensor in tensors if differentiable(tensor)]
            return call.outputs_in(result, args, left, tape, check=False)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a model may check its inputs, and raise anything where they are misread
            return None
