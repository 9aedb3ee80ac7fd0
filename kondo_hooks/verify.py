"""Whether the kept rows came out of the replay as they came out of the screen."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kondo_hooks.errors import ReplayMismatchError, coupled_rows
from kondo_hooks.node import Call
from kondo_hooks.parts import Part
from kondo_hooks.rank_one import RankOne

if TYPE_CHECKING:
    from kondo_hooks.replay import Replayed


def verify(replayed: "Replayed") -> None:
    """Hold a replay's outputs against what the screen returned for the same rows.

    Raises:
        ReplayMismatchError: if they differ by more than another order of summation explains.
    """
    group = replayed.group
    call = group[0].call
    for i, output in replayed.all_outputs.items():
        where = call.rows[i]
        assert where is not None
        ours, theirs = [], []
        for part, rows in zip(group, rows_of(group, i, output), strict=True):
            grad, expected = part.grads[i], part.output(i)
            if isinstance(grad, RankOne):
                ours.append(grad.log_probs(rows[tuple(slice(n) for n in grad.shape)]))
                theirs.append(grad.logp)
            elif expected is not None:
                if any(a > b for a, b in zip(expected.shape, rows.shape, strict=True)) or (
                    len(group) == 1 and expected.shape != rows.shape
                ):
                    raise ReplayMismatchError(wrong_axis(call, i, rows.shape, expected.shape, where.axis))
                ours.append(rows[tuple(slice(n) for n in expected.shape)] if len(group) > 1 else rows)
                theirs.append(expected)
        if len(group) > 1:
            ours, theirs = ([torch.cat([t.reshape(-1) for t in each])] if each else [] for each in (ours, theirs))
        if not ours:
            continue
        difference, magnitude = largest_difference(theirs[0], ours[0])
        if not difference <= call.autocast.tolerance(output) * max(magnitude, 1e-30):
            raise ReplayMismatchError(
                f"gated: replaying {sum(map(len, group))} of {sum(p.call.batch for p in group)} rows "
                f"changed {name_of(call, i)} by up to {difference:.3g} (its largest value is {magnitude:.3g}): in this "
                "model a row's output depends on the other rows of the batch, or the model is not deterministic. "
                "Likely: normalisation or attention over the batch axis, state that a forward updates, randomness from "
                "outside torch, inputs that are no tensors (arrays, objects of your own: they are not cut into rows), "
                "rows of different lengths packed into one batch for a model that does not mask what is padded, "
                "or a batch axis that is not the first one (then name it with batch_dim=). Make "
                "the layer work row by row, or gate a part of the model that does. No gradient was changed."
            )


def name_of(call: Call, i: int) -> str:
    """An output, as a message names it."""
    path = call.paths[i]
    return path if path.startswith("the ") else f"output {path}" if path else "the output"


def wrong_axis(call: Call, i: int, shape: Sequence[int], expected: Any, axis: int) -> str:
    """The message for rows that came out on another axis, or in another number."""
    name = name_of(call, i)
    if call.makes_loss(i):
        return coupled_rows(name)
    wanted = tuple(expected) if isinstance(expected, torch.Size) else f"{expected} on axis {axis}"
    return (
        f"gated: for the kept rows {name} has shape {tuple(shape)} where {wanted} was "
        "expected: rows were taken on the wrong axis. Name the batch axis with batch_dim=."
    )


def rows_of(group: list[Part], i: int, output: Tensor) -> list[Tensor]:
    """The output's rows, part by part; a reading on a wrong axis gives what it gives."""
    where = group[0].call.rows[i]
    assert where is not None
    sizes = [len(part) * where.repeat for part in group]
    if output.dim() <= where.axis or output.shape[where.axis] != sum(sizes):
        shape = [*output.shape]
        raise ReplayMismatchError(wrong_axis(group[0].call, i, shape, sum(sizes), where.axis))
    return list(output.detach().split(sizes, where.axis)) if len(group) > 1 else [output.detach()]


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
