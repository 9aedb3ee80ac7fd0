"""Whether the kept rows came out of the replay as they came out of the screen.

A GPU's kernels sum in another order for another number of rows, so equality is not to be had. What is held against
what, the cheapest first:

1. Only where the loss sent a gradient; and of logits only the log-probs of the actions, where the loss took nothing
   else from them. Each column of an output (a class, a feature) has its own measure, its largest value among those that
   came out otherwise: a mask of -1e9 or one large column must not hide the others.
2. A column that fails is measured by all rows of the screen: a value near zero is no measure of its own rounding. A
   log-prob may differ by some fraction of a nat, whatever its size.
3. Then a control decides: the same rows once more, in a batch of the screen's size and without the other rows. Rounding
   that comes of the batch size is gone there; what comes of the other rows is not.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kondo_hooks.core.call import Call
from kondo_hooks.core.compact import RankOne
from kondo_hooks.core.kept_rows import Part
from kondo_hooks.delight.loss_code import Picked
from kondo_hooks.errors import ReplayMismatchError, coupled_rows
from kondo_hooks.rules.readback import Readback
from kondo_hooks.same.rounding import Limit, by_column, differences

if TYPE_CHECKING:
    from kondo_hooks.core.replay import Replayed


def verify(replayed: "Replayed") -> None:
    """Hold a replay's outputs against what the screen returned for the same rows.

    Raises:
        ReplayMismatchError: if they differ by more than another order of summation explains.
    """
    call = replayed.group[0].call
    for i, output in replayed.all_outputs.items():
        compared = [c for c in _compare(replayed.group, i, output) if not c.same]
        if not compared:
            continue
        limit = _limit(call, i, output)
        exceeding = [c for c in compared if c.exceeds(limit)]
        if exceeding:
            worst = max(exceeding, key=lambda c: limit.excess(c.apart, c.measure))
            if not _is_rounding(replayed, worst, limit):
                raise ReplayMismatchError(_message(replayed.group, worst))


def verify_later(replayed: "Replayed", back: Readback) -> None:
    """The same by a comparison that does not wait for its result, and that is stricter: where it fails, ``verify``.

    Sets ``replayed.in_doubt`` when ``back`` is read.
    """
    call = replayed.group[0].call
    for i, output in replayed.all_outputs.items():
        limit = _limit(call, i, output, wait=False)

        def note(excess: list[float], most: float = limit.absolute) -> None:
            replayed.in_doubt |= not excess[0] <= most

        for compared in _compare(replayed.group, i, output):
            if output.device.type == "cpu" and compared.same:
                continue
            back.ask([compared.excess(limit.relative)], note)


def verify_company(replayed: "Replayed") -> None:
    """Hold the rows' values against the screen's once more, in a batch of its size that has no other rows.

    Rounding that comes of the batch size does not blur this comparison, so it is the stricter one; it costs a run.

    Raises:
        ReplayMismatchError: if the values depend on the other rows.
    """
    for part in replayed.group:
        for i, again in (replayed.alone(part) or {}).items():
            usual = _limit(part.call, i, again)
            limit = Limit(usual.relative / 4, usual.absolute / 4, 0.0)
            for compared in _compare([part], i, again):
                if not compared.same and compared.exceeds(limit):
                    raise ReplayMismatchError(_message([part], compared))


class _Compared:
    """One part's rows of one output, the replay's beside the screen's.

    Attributes:
        part: the part.
        i: which output.
        apart: (columns,) largest differences where the loss sent a gradient; once ``exceeds`` was asked.
        measure: (columns,) what they are held against.
    """

    apart: Tensor
    measure: Tensor

    def __init__(
        self, part: Part, i: int, rows: Tensor, read: Callable[[Tensor], Tensor], theirs: Tensor, sent: Tensor | None
    ):
        self.part = part
        self.i = i
        self._read, self._ours, self._theirs, self._sent = read, read(rows), theirs, sent

    @functools.cached_property
    def same(self) -> bool:
        """Whether they are equal."""
        return torch.equal(self._ours, self._theirs)

    def excess(self, relative: float) -> Tensor:
        """() the most that a column differs by beyond what is allowed of its values that differ; NaN if one is none."""
        if self._ours.shape != self._theirs.shape:
            return self._theirs.new_full((), torch.nan)
        if not self._ours.numel():
            return self._theirs.new_zeros(())
        apart, nothing = self._ours - self._theirs, torch.zeros((), dtype=self._ours.dtype, device="cpu")
        if self._sent is not None:
            apart = torch.where(self._sent == 0, nothing, apart)
        differing = torch.where(apart == 0, nothing, self._theirs)
        largest, size = (torch.linalg.vector_norm(t, torch.inf, 0) for t in (apart, differing))
        return torch.sub(largest, size, alpha=relative).max()

    def exceeds(self, limit: Limit) -> bool:
        """Whether any column differs by more than it may, by the kept rows' measure and then by all rows'."""
        self.apart, self.measure = differences(self._ours, self._theirs, self._used)
        allowed = limit.allows(self.apart, self.measure)
        if not allowed.all() and (everything := self.part.measure(self.i)) is not None:
            self.measure = torch.maximum(self.measure, everything.to(self.measure))
            allowed = limit.allows(self.apart, self.measure)
        return not bool(allowed.all())

    @property
    def _used(self) -> Tensor | None:
        return None if self._sent is None else self._sent != 0

    def differs_from(self, again: Tensor) -> Tensor:
        """(columns,) largest difference of another run of the same rows from the screen."""
        return differences(self._read(again), self._theirs, self._used)[0]


def _compare(group: list[Part], i: int, output: Tensor) -> Iterator[_Compared]:
    call = group[0].call
    where = call.rows[i]
    assert where is not None
    axis = where.axis
    for part, rows in zip(group, rows_of(group, i, output), strict=True):
        grad, picked = part.grads[i], part.call.picked.get(i) if part.held is None or part.is_cut else None
        if picked is not None and part.is_cut:
            picked = picked.until(rows.shape[1])
        expected = part.output(i) if picked is None else None
        if picked is not None:
            index = part.rows.to(picked.index.device)
            screened = picked.values.index_select(0, index).reshape(-1, 1)
            sent = None if picked.sent is None else picked.sent.index_select(0, index).reshape(-1, 1)

            def log_probs(rows: Tensor, picked: Picked = picked, index: Tensor = index) -> Tensor:
                return picked.of(rows, index).reshape(-1, 1)

            yield _Compared(part, i, rows, log_probs, screened, sent)
        elif isinstance(grad, RankOne):

            def by_form(rows: Tensor, grad: RankOne = grad) -> Tensor:
                return grad.log_probs(rows[tuple(slice(n) for n in grad.shape)]).reshape(-1, 1)

            yield _Compared(part, i, rows, by_form, grad.logp.reshape(-1, 1), grad.coefficient.reshape(-1, 1))
        elif expected is not None:
            if any(a > b for a, b in zip(expected.shape, rows.shape, strict=True)) or (
                len(group) == 1 and expected.shape != rows.shape
            ):
                raise ReplayMismatchError(wrong_axis(call, i, rows.shape, expected.shape, axis))

            def values(rows: Tensor, shape: torch.Size = expected.shape) -> Tensor:
                return by_column(rows[tuple(slice(n) for n in shape)], axis)

            sent = None if grad is None or grad.is_complex() else by_column(grad, axis)
            yield _Compared(part, i, rows, values, by_column(expected, axis), sent)


def _limit(call: Call, i: int, output: Tensor, wait: bool = True) -> Limit:
    """What may differ in an output; log-probs that nobody has told are seen by their values if there is time."""
    # An output may have been made more precise at the end. A control would tell; where none can run the model's own
    # types do.
    types = () if call.checks.reruns else call.checks.types
    lowest, usual = call.scene.autocast.lowest(output, types), call.scene.autocast.tolerance(output, types)
    holds = "log-probs" if i in call.picked else "logits" if i in call.policy else ""
    if wait and holds == "logits" and bool(((values := call.outputs[i]) <= 0).all() or (values >= 0).all()):
        holds = "log-probs"
    return call.checks.limit(call.paths[i], lowest, usual, holds)


def _is_rounding(replayed: "Replayed", compared: _Compared, limit: Limit) -> bool:
    """Whether a control shows that a difference comes of the batch size alone; how large it is, is remembered."""
    part, excess = compared.part, limit.excess(compared.apart, compared.measure)
    if excess > limit.most or (again := replayed.alone(part)) is None:
        return False
    left = compared.differs_from(again[compared.i])
    if not (limit.allows(left, compared.measure) | (left <= 0.5 * compared.apart)).all():
        return False
    if replayed.depends_on_size(part, compared.i):
        return False
    noise, path = part.call.checks.noise, part.call.paths[compared.i]
    noise[path] = max(noise.get(path, 0.0), excess)
    return True


def _message(group: list[Part], compared: _Compared) -> str:
    worst = int((compared.apart / compared.measure.clamp_min(1e-30)).nan_to_num(torch.inf).argmax())
    if compared.part.texts is not None:
        return (
            f"gated: replaying {sum(part.samples for part in group)} texts of packed rows changed "
            f"{name_of(group[0].call, compared.i)} by up to {float(compared.apart[worst]):.3g}: texts of one row see "
            "each other, or the model is not deterministic. Mask attention across texts (transformers does so by "
            "position_ids alone: without an attention_mask, and with use_cache=False), or keep one text a row. If "
            "these are no texts and rows are the samples, say segments=False. No gradient was changed."
        )
    return (
        f"gated: replaying {sum(map(len, group))} of {sum(p.call.batch for p in group)} rows changed "
        f"{name_of(group[0].call, compared.i)} by up to {float(compared.apart[worst]):.3g} (its largest value is "
        f"{float(compared.measure[worst]):.3g}). In this model "
        + ("later positions matter to earlier ones, or " if any(part.is_cut for part in group) else "")
        + "a row's output depends on the other rows of the batch, "
        "or the model is not deterministic. Look for normalisation or attention over the batch axis, state that a "
        "forward updates, randomness from outside torch, padding that is not masked, inputs that cannot be cut into "
        "rows, or rows on another axis (name it: batch_dim=). Make that layer work row by row, or gate a part of the "
        "model that does. If it is only rounding, tolerance= allows more. No gradient was changed."
    )


def name_of(call: Call, i: int) -> str:
    """An output, as a message names it."""
    return call.output_name(i)


def wrong_axis(call: Call, i: int, shape: Sequence[int], expected: Any, axis: int) -> str:
    """The message for rows that came out on another axis, or in another number."""
    name = name_of(call, i)
    if call.makes_loss(i):
        return coupled_rows(name)
    wanted = tuple(expected) if isinstance(expected, torch.Size) else f"{expected} on axis {axis}"
    return (
        f"gated: for the kept rows {name} has shape {tuple(shape)} where {wanted} was expected: rows were taken on the "
        "wrong axis (name it with batch_dim=), or come out shorter than the batch where the loss uses them (pad to a "
        "length that does not depend on the rows: total_length=)."
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
