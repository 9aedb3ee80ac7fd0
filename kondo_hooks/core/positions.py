"""Where a call's inputs keep the positions of its rows, so that rows can be cut after some of them.

What comes before a position must not depend on what comes after it, as in a causal model. That is looked at once a
structure, before anything is cut, and each replay is held against the screen besides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kondo_hooks.core.call import Call
from kondo_hooks.core.kept_rows import Part, reading
from kondo_hooks.core.readings import Learned, run_rows
from kondo_hooks.errors import PrefixError
from kondo_hooks.rows.axes import Rows
from kondo_hooks.same.state import Autocast

if TYPE_CHECKING:
    from kondo_hooks.core.arrival import Arrival

Axes = tuple[tuple[int, ...], ...]
_MOST_LEFT_OUT = 8


@dataclass(frozen=True)
class Positions:
    """Where a call keeps the positions of its rows.

    Attributes:
        layout: where the inputs keep their rows.
        inputs: of each input the axes that are as long as its rows.
        more: how many positions the inputs have beyond the outputs: labels that are shifted.
        length: of an output's rows.
        outputs: those that have the positions on the first axis of their rows.
    """

    layout: tuple[Rows | None, ...]
    inputs: Axes
    more: int
    length: int
    outputs: frozenset[int]

    def fits(self, call: Call) -> bool:
        """Whether a call's inputs are as long as this says."""
        sizes = (self.length, self.length + 1)
        return len(call.inputs) == len(self.inputs) and all(
            leaf.dim() > axis and leaf.shape[axis] in sizes
            for leaf, axes in zip(call.inputs, self.inputs, strict=True)
            for axis in axes
        )

    def shorten(self, inputs: Sequence[Tensor], length: int) -> list[Tensor]:
        """Inputs for outputs of so many positions."""
        found = []
        for leaf, axes in zip(inputs, self.inputs, strict=True):
            for axis in axes:
                leaf = leaf.narrow(axis, 0, leaf.shape[axis] - self.length + length)
            found.append(leaf)
        return found


def locate(arrival: "Arrival", known: Positions | None, learned: Learned, look: bool) -> Positions | None:
    """Where a call keeps the positions of its rows; None where these have one position.

    Args:
        arrival: the call, with its signal.
        known: of an earlier call of its structure.
        learned: where inputs keep their rows.
        look: run rows to see where that is not known; else the likeliest is taken, and the replay tells if it is wrong.

    Raises:
        PrefixError: if its rows cannot be cut, or their first positions come out otherwise without the others.
    """
    call = arrival.call
    used = [i for i, g in enumerate(arrival.grads) if g is not None and call.rows[i] is not None]
    if not used or (arrival.signal is not None and arrival.signal.valid.shape[1] == 1):
        return None
    shapes = {
        i: tuple(where.first(call.outputs[i]).shape[1:]) for i, where in enumerate(call.rows) if where is not None
    }
    leader = arrival.follows
    if leader is not None:  # it has no policy of its own, and what was decided for that one is for its rows, too
        if leader.cut is None:
            return None
        length = leader.cut.length
        outputs = frozenset(i for i in used if shapes[i][:1] == (length,))
    else:
        first = used[0] if arrival.source is None else arrival.source
        length = shapes[first][0]
        same = [i for i in used if shapes[i][:1] == (length,) and (arrival.signal is None or arrival.positions.get(i))]
        outputs = frozenset({first, *same})
    for i in used:
        where, grad = call.rows[i], arrival.grads[i]
        if where is not None and where.repeat != 1:
            raise PrefixError(
                f"gated: unit='prefix': {call.output_name(i)} has its positions flattened into the rows, "
                f"{tuple(call.outputs[i].shape)}, so rows cannot be cut: make the loss outside of the model from "
                "outputs (B, T, ...), or use unit='token'"
            )
        if i not in outputs and grad is not None and bool(grad.any()):
            raise PrefixError(
                f"gated: unit='prefix': {call.output_name(i)} gets a gradient and has no positions, {shapes[i]}: it "
                "may need all of them (a pooled value?), so rows cannot be cut. Use unit='token'"
            )
    if not outputs:
        return None
    source = min(outputs) if arrival.source is None else arrival.source
    if call.decides_at_once:
        raise PrefixError(
            "gated: unit='prefix': an input of the model requires grad, and what is cut of it would have none: detach "
            "it, or use unit='token'"
        )
    layout = tuple(reading(Part(call, torch.zeros(0, dtype=torch.long, device="cpu"), []), learned))
    if known is not None:
        known = replace(known, layout=layout, length=length, outputs=outputs)
        if known.fits(call):
            return known
    some = arrival.some()
    rows = torch.arange(min(2, call.batch), device=call.outputs[0].device) if some is None else some.rows
    return _find(call, rows, source, Positions(layout, (), 0, length, outputs), look)


def _find(call: Call, rows: Tensor, source: int, asked: Positions, look: bool) -> Positions:
    """Where the inputs keep the positions, by a run of half of them."""
    name, length = call.output_name(source), asked.length
    every = [replace(asked, inputs=axes, more=more) for axes, more in _places(call.inputs, asked.layout, length)]
    if not every:
        raise _no_axis(f"{name} has {length} positions", call.inputs)
    if not look or length < 2:
        return every[0]
    taken = [leaf if at is None else at.take(leaf, rows) for leaf, at in zip(call.inputs, asked.layout, strict=True)]
    half, differs = length // 2, False
    for found in every:
        both = taken, found.shorten(taken, half)
        # Autocast would hide that later positions matter a little; without it inputs of a low type may not fit.
        for autocast in dict.fromkeys((call.scene.autocast.off(), call.scene.autocast)):
            whole, part = (run_rows(call, inputs, autocast) for inputs in both)
            if whole is not None and part is not None:
                if all(_is_first(whole[i], part[i], half, call.rows[i], autocast) for i in asked.outputs):
                    return found
                differs |= part[source].dim() == whole[source].dim() and half in part[source].shape
                break
    raise _cannot_cut(name, half, length, differs)


def _no_axis(found: str, inputs: Sequence[Tensor]) -> PrefixError:
    shapes = [tuple(leaf.shape) for leaf in inputs]
    return PrefixError(
        f"gated: unit='prefix': {found}, and no input has an axis as long (inputs: {shapes}), so rows cannot be cut: "
        "use unit='token'"
    )


def _cannot_cut(name: str, half: int, length: int, differs: bool) -> PrefixError:
    if differs:
        return PrefixError(
            f"gated: unit='prefix': the first {half} positions of {name} come out otherwise without the others: later "
            "positions matter (attention to both sides?), so rows cannot be cut. Use unit='token'."
        )
    return PrefixError(
        f"gated: unit='prefix': the model does not run on the first {half} of {length} positions (an argument that "
        "says how many there are, a fixed length?), so rows cannot be cut: use unit='token'"
    )


def _places(inputs: Sequence[Tensor], layout: Sequence[Rows | None], length: int) -> list[tuple[Axes, int]]:
    """Axes of the inputs that may be the positions, with how many more these are than ``length``; likeliest first.

    A feature may be as long by chance, or another sequence (an encoder's), so each input may also be left as it is.
    """
    found: dict[tuple[Axes, int], None] = {}
    both = (length, length + 1)
    for more in (0, 1):
        alike = (length + more,)
        # A mask of actions beside ids, which are one longer: rows that begin with either are positions.
        for sizes in (both, alike) if _begin_with(inputs, layout) >= {*both} else (alike, both):
            every = [
                tuple(a for a, n in enumerate(leaf.shape) if n in sizes and (where is None or a != where.axis))
                for leaf, where in zip(inputs, layout, strict=True)
            ]
            has_rows = [bool(axes) and where is not None for axes, where in zip(every, layout, strict=True)]
            if not any(has_rows):
                continue
            first = [axes[:1] for axes in every]
            found[tuple(every), more] = found[tuple(first), more] = None
            for i in [i for i, axes in enumerate(every) if axes][:_MOST_LEFT_OUT]:
                for likely in (every, first):
                    left = [() if i == j else axes for j, axes in enumerate(likely)]
                    if any(has and axes for has, axes in zip(has_rows, left, strict=True)):
                        found[tuple(left), more] = None
    return list(found)


def _begin_with(inputs: Sequence[Tensor], layout: Sequence[Rows | None]) -> set[int]:
    """The sizes of the first axis of the inputs' rows."""
    axes = [(leaf, position_axis(where)) for leaf, where in zip(inputs, layout, strict=True) if where is not None]
    return {leaf.shape[axis] for leaf, axis in axes if leaf.dim() > axis}


def _is_first(whole: Tensor, part: Tensor, length: int, where: Rows | None, autocast: Autocast) -> bool:
    """Whether rows are the first positions of others, but for rounding."""
    if where is None or whole.dim() != part.dim():
        return False
    expected = whole.narrow(position_axis(where), 0, length)
    if expected.shape != part.shape:
        return False
    largest = expected.abs().amax() if expected.numel() else expected.new_zeros(())
    return bool(((expected - part).abs() <= autocast.tolerance(part) * largest).all())


def position_axis(where: Rows) -> int:
    """The axis of an output that its rows begin with."""
    return 1 if where.axis == 0 else 0


def locate_before(
    call: Call,
    layout: Sequence[Rows | None],
    length: int,
    known: Positions | None,
    look: Callable[[list[Tensor]], list[Tensor] | None] | None,
    some: list[Tensor],
) -> Positions:
    """Where the inputs of a call that has not run keep so many positions.

    Args:
        call: the call.
        layout: where its inputs keep their rows.
        length: how many positions.
        known: of an earlier call of its structure.
        look: what the model returns for inputs, None if it fails; None where it must not be run.
        some: the inputs of one or two rows.

    Raises:
        PrefixError: as :func:`locate`.
    """
    asked = Positions(tuple(layout), (), 0, length, frozenset())
    if known is not None and replace(known, layout=asked.layout, length=length).fits(call):
        return replace(known, layout=asked.layout, length=length)
    every = [replace(asked, inputs=axes, more=more) for axes, more in _places(call.inputs, layout, length)]
    if not every:
        raise _no_axis(f"preselect() was given {length} tokens a row", call.inputs)
    if look is None or length < 2:
        return every[0]
    whole, half, differs = look(some), length // 2, False
    for found in every:
        part = look(found.shorten(some, half))
        if whole is None or part is None or len(whole) != len(part):
            continue
        # Outputs may be as long as the inputs, of which the tokens are then the first.
        pairs = {
            i: (a, b, a.shape[1] - length)
            for i, (a, b) in enumerate(zip(whole, part, strict=True))
            if a.dim() > 1 and a.dim() == b.dim() and a.shape[1] in (length, length + 1) and b.shape[1] != a.shape[1]
        }
        if pairs and all(_is_first(a, b, half + n, Rows(0), call.scene.autocast) for a, b, n in pairs.values()):
            return replace(found, outputs=frozenset(pairs))
        differs |= any(b.shape[1] == half + n for _, b, n in pairs.values())
    raise _cannot_cut("its outputs", half, length, differs)
