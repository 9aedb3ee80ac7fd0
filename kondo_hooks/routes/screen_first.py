"""The screen-first route: delight was known before the forward, so only the kept rows run.

There is no screen to compare with. Where the shapes leave a doubt about which axis holds the rows, the whole batch is
run once, without a graph, to find out; what was found is remembered.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kondo_hooks.core.call import LEFT, Call
from kondo_hooks.core.kept_rows import Part
from kondo_hooks.core.packs import Packed
from kondo_hooks.core.positions import Positions, locate_before
from kondo_hooks.core.prefix import cut_points
from kondo_hooks.core.readings import Learned, settle_outputs
from kondo_hooks.core.replay import AmbiguousRowsError, replay
from kondo_hooks.core.texts import Named, Texts, find_texts
from kondo_hooks.delight.graph import silence
from kondo_hooks.errors import PrefixError, met_rows_not_run, no_batch_axis, unknown_positions
from kondo_hooks.routes.screen_texts import find_outputs, run_texts
from kondo_hooks.rows.axes import (
    Layout,
    Rows,
    blocks,
    candidate_rows,
    fill_index,
    is_doubtful,
    join_rows,
    layouts,
    rows_between,
)
from kondo_hooks.rows.tree import Tree, flatten, unflatten
from kondo_hooks.rules.samples import Kept
from kondo_hooks.same.state import forked_rng, rng_state_now, same_rng_state


class _Spread(torch.autograd.Function):
    """Kept rows in a full-size tensor; dropped rows copy the first kept one and send no gradient back."""

    @staticmethod
    def forward(
        ctx: Any, kept: Tensor, where: Rows, rows: Tensor, source: Tensor, factors: Tensor | None, valid: Tensor
    ) -> Tensor:
        ctx.where, ctx.rows, ctx.factors, ctx.valid = where, rows, factors, valid
        ctx.kondo_rows, ctx.batch = True, len(source)
        return where.take(kept, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if (parameter := getattr(ctx, "kondo_met", None)) is not None:
            dropped = torch.ones(ctx.batch, dtype=torch.bool, device=grad.device)
            dropped[ctx.rows.to(grad.device)] = False
            if bool(ctx.where.take(grad, dropped.nonzero().flatten()).any()):
                raise RuntimeError(met_rows_not_run(parameter))
        kept = ctx.where.take(grad, ctx.rows)
        if ctx.factors is not None:
            if ctx.factors.dim() == 2:
                _check_positions(ctx.where.first(grad), ctx.valid)
            kept = ctx.where.weighted(kept, ctx.factors)
        return kept, None, None, None, None, None


def _check_positions(grad: Tensor, valid: Tensor) -> None:
    """Fewer tokens than positions stand for the first ones: the loss must not use the others."""
    tokens = valid.shape[1]
    if grad.dim() < 2 or grad.shape[1] <= tokens or tokens == 1:
        return
    used = grad.flatten(2).ne(0).any(-1) if grad.dim() > 2 else grad.ne(0)
    used[:, :tokens] &= ~valid.to(used.device)
    if used.any():
        raise RuntimeError(
            f"gated: preselect() was given {tokens} tokens a row for outputs of {grad.shape[1]} positions, and the "
            f"loss uses others than the first {tokens}: give it logp, advantages and mask of {grad.shape[1]} positions"
        )


@dataclass
class Screened:
    """A decision that waits for its call.

    Attributes:
        batch: B rows that the call has.
        kept: which of them are, and with what factors on their gradients.
        valid: (B,) or (B, T), False on masked tokens.
        shared_loss: an output without rows may be used, as it is for the kept rows alone.
        one_pass: every rank makes this pass and no other, so doubtful shapes are read in the likeliest way.
        passes: how many may be made of rows that are cut after their last kept position; 0 where they are not.
        segments: what tells the texts that a row holds, where the user named it.
        hooks: that make the gradient of a row which stands in exactly zero, to be removed after the backward.
    """

    batch: int
    kept: Kept
    valid: Tensor
    one_pass: bool = False
    shared_loss: bool = False
    passes: int = 0
    segments: Named = None
    forwarded: int = 0
    hooks: list[Any] = field(default_factory=list)

    def run(self, call: Call, batch_dim: int, learned: Learned, learned_outputs: dict[str, Rows | None]) -> Tree:
        """Call the model on the kept rows, with a graph; returns its outputs in full size.

        Args:
            call: the call, not yet run.
            batch_dim: axis of the rows.
            learned: where inputs keep their rows; updated.
            learned_outputs: where outputs do, by path; updated.
        """
        batch = self.batch
        call.expect(batch, batch_dim)
        if not (batch_dim or call.sequences) and (texts := find_texts(call, self.segments)) is not None:
            if len(texts) != batch:
                raise ValueError(
                    f"gated: preselect() was given {batch} samples, and the rows of the call hold {len(texts)} texts: "
                    "give it one value, or one row of values, for each text (segments=False if rows are the samples)"
                )
            return self._run_texts(call, texts, learned)
        if not any(leaf.dim() > batch_dim and leaf.shape[batch_dim] == batch for leaf in call.inputs):
            shapes = [tuple(leaf.shape) for leaf in call.inputs]
            raise ValueError(
                f"gated: preselect() was given {batch} rows, but no input of the call has them on axis {batch_dim} "
                f"(inputs: {shapes})"
            )
        kept = self.kept
        # Nothing kept: one row stands in with a gradient of zero, so that parameters get zero and not None.
        nothing = not len(kept.rows)
        if nothing:
            kept = Kept(kept.rows.new_zeros(1), self.valid.new_zeros(1, *self.valid.shape[1:], dtype=torch.float32))
        try:
            layout = self._inputs(call, kept.rows, batch_dim, learned)
        except AmbiguousRowsError:
            every = torch.arange(batch, device=kept.rows.device)
            kept = Kept(every, self.kept.spread(batch, torch.float32))
            layout = [candidate_rows(leaf, batch, batch_dim)[0] for leaf in call.inputs]
        rows, factors = kept.rows, kept.factors
        self.forwarded = len(rows)
        taken = [
            leaf if where is None else where.take(leaf, rows) for leaf, where in zip(call.inputs, layout, strict=True)
        ]
        if len(rows) == batch and factors is None:
            return call.run_given()
        before = call.state.attributes.before()
        positions = self._positions(call, layout, rows, factors, learned)
        if positions is None:
            result = self._run(call, taken, len(rows))
            paths, leaves = flatten(result)
        else:
            assert factors is not None
            result, paths, leaves = self._run_cut(call, taken, factors, positions)

        def is_constant(path: str, leaves: int) -> bool:
            """Told by a run of one row more, once: layers are as many, and a list with an entry a row is longer."""
            key = (path, *call.input_paths)
            if key not in learned.constant_lists and not self.one_pass and self.batch > 1:
                others = self._run_otherwise(call, rows, layout, batch_dim)
                if sum(other.startswith(path) for other in others) == leaves:
                    learned.constant_lists.add(key)
            return key in learned.constant_lists

        call.refuse_row_lists(result, len(rows), is_constant)
        change = call.state.attributes.compare(before, lambda _: False)
        if positions is not None and change.new:
            raise PrefixError(
                f"gated: unit='prefix': the model leaves tensors in its attributes ({next(iter(change.new))}), which "
                "would be those of some rows alone: return them, or use unit='token'"
            )
        returned = len(leaves)
        paths += [LEFT + path for path in change.new]
        leaves += change.new.values()
        if nothing:
            outputs = [leaf for leaf in leaves if leaf.grad_fn is not None]
            self.hooks = silence(outputs, (leaf for leaf in call.inputs if leaf.grad_fn is not None))
        wheres = self._outputs(call, paths, leaves, rows, layout, batch_dim, learned_outputs)

        source = fill_index(rows, batch)
        spread: dict[int, Tensor] = {}
        for path, leaf, where in zip(paths, leaves, wheres, strict=True):
            if id(leaf) in spread:
                continue
            if where is not None:
                shape = tuple(where.first(leaf).shape[1:])
                tokens = 1 if factors is None or factors.dim() == 1 else factors.shape[1]
                if leaf.requires_grad and not _has_positions(shape, tokens):
                    by_row = shape[0] < tokens
                    learned.warn("positions", unknown_positions(path or "the output", shape, by_row=by_row))
                spread[id(leaf)] = _Spread.apply(leaf, where, rows, source, factors, self.valid)
            elif leaf.requires_grad and not self.shared_loss:
                spread[id(leaf)] = leaf.view_as(leaf)  # a hook on a parameter would outlive the call
                spread[id(leaf)].register_hook(_refuse(path, batch))
        if change.after is not None:
            change.after.substitute({id(leaf): spread[id(leaf)] for leaf in change.new.values() if id(leaf) in spread})
        return unflatten(result, [spread.get(id(leaf), leaf) for leaf in leaves[:returned]])

    def _run_texts(self, call: Call, texts: Texts, learned: Learned) -> Tree:
        """The same for texts of packed rows."""
        kept, nothing = self.kept, not len(self.kept.rows)
        packed = Packed(texts, kept.rows, kept.factors, bool(self.passes), more=1)  # labels may be shifted
        if nothing:
            packed = Packed(texts, texts.segments.lengths.argmin().view(1), torch.zeros(1, device="cpu"))
        self.forwarded = len(packed)
        if len(packed) == len(texts) and packed.factors is None:
            return call.run_given()
        key = ("texts", *call.input_paths)
        if key not in learned.positions and not self.one_pass:
            learned.positions[key] = find_outputs(call, texts, packed, lambda inputs: self._outputs_of(call, inputs))
        known = learned.positions.get(key)
        result = run_texts(call, texts, packed, lambda inputs: self._run(call, inputs, len(packed)), known)
        if nothing:
            outputs = [leaf for leaf in flatten(result)[1] if leaf.grad_fn is not None]
            self.hooks = silence(outputs, (leaf for leaf in call.inputs if leaf.grad_fn is not None))
        return result

    def _run(self, call: Call, inputs: list[Tensor], rows: int) -> Tree:
        try:
            return call.run_kept(inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise RuntimeError(
                f"gated: after preselect() the kept rows run alone, and on {rows} of the {self.batch} rows of this "
                f"call the model failed: {type(error).__name__}: {error}. If it keeps a state of all rows, or needs "
                "several, leave preselect() away."
            ) from error

    def _positions(
        self, call: Call, layout: Layout, rows: Tensor, factors: Tensor | None, learned: Learned
    ) -> Positions | None:
        """Where rows that are cut keep their positions; None where they are not cut."""
        if not self.passes or call.batch_dim or factors is None or factors.dim() < 2 or factors.shape[1] == 1:
            return None
        key = tuple(call.input_paths)
        known = learned.positions.get(key)
        some = [leaf if at is None else at.take(leaf, rows[:2]) for leaf, at in zip(call.inputs, layout, strict=True)]
        training, requires_grad = call.scene.flags

        def look(inputs: list[Tensor]) -> list[Tensor] | None:
            with call.state.restored_flags(((False,) * len(training), requires_grad)):
                try:
                    return list(self._outputs_of(call, inputs).values())
                except torch.OutOfMemoryError:
                    raise
                except Exception:
                    return None

        found = locate_before(call, layout, factors.shape[1], known, None if self.one_pass else look, some)
        learned.positions[key] = found
        return found

    def _run_cut(
        self, call: Call, taken: list[Tensor], factors: Tensor, positions: Positions
    ) -> tuple[Tree, list[str], list[Tensor]]:
        """Run rows no further than to their last kept position, those of about the same length together.

        Positions that are not run hold a copy of the last that is, without a graph.
        """
        place = torch.arange(1, factors.shape[1] + 1, device=factors.device)
        lengths = torch.where(factors != 0, place, 1).amax(1).cpu()
        order = lengths.argsort(stable=True)
        found: list[tuple[Tree, list[str], list[Tensor]]] = []
        sizes: list[tuple[int, int]] = []
        ends = cut_points(lengths[order], self.passes)
        for first, last in zip([0, *ends], ends, strict=False):
            if first == last:
                continue
            index, longest = order[first:last], int(lengths[order[last - 1]])
            mine = [
                leaf if where is None else where.take(leaf, index)
                for leaf, where in zip(taken, positions.layout, strict=True)
            ]
            result = self._run(call, positions.shorten(mine, longest), len(index))
            found.append((result, *flatten(result)))
            sizes.append((len(index), longest))
        result, paths, _ = found[0]
        back = order.argsort()
        leaves = []
        for i, each in enumerate(zip(*(pieces for _, _, pieces in found), strict=True)):
            if any(leaf.dim() < 1 or leaf.shape[0] != n for leaf, (n, _) in zip(each, sizes, strict=True)):
                if each[0].requires_grad:
                    raise PrefixError(
                        f"gated: unit='prefix': {paths[i] or 'the output'} {tuple(each[0].shape)} has no rows on axis "
                        "0, or positions flattened into them: rows that are cut cannot be put together again. Use "
                        "unit='token'"
                    )
                leaves.append(each[0])
                continue
            if self.one_pass:
                has_positions = all(
                    leaf.shape[1:2] == (longest,) for leaf, (_, longest) in zip(each, sizes, strict=True)
                )
            else:
                has_positions = i in positions.outputs
            if has_positions:
                more = each[0].shape[1] - sizes[0][1]
                each = tuple(_stretched(leaf, positions.length + more) for leaf in each)
            joined = join_rows(each, 0).index_select(0, back.to(each[0].device))
            if not has_positions and joined.requires_grad:
                joined.register_hook(_refuse_cut(paths[i]))
            leaves.append(joined)
        return result, paths, leaves

    def _inputs(self, call: Call, rows: Tensor, batch_dim: int, learned: Learned) -> Layout:
        batch = self.batch
        known = learned.known(call, batch)
        if known is not None and any(known):
            return known
        candidates = [candidate_rows(leaf, batch, batch_dim) for leaf in call.inputs]
        if self.one_pass or not _doubtful(call.inputs, candidates, batch_dim) or len(rows) == batch:
            return [options[0] for options in candidates]
        if learned.waits(call):
            raise AmbiguousRowsError
        # The readings are told apart as a replay tells them: by what comes out.
        with forked_rng(call.scene.rng), call.state.untouched():
            call.screen(batch_dim, record=True, copy=False)
            settle_outputs(call, {}, False, learned.warn, True)
            if call.whole is None and call.batch == batch:
                everywhere = [
                    None if call.is_left(i) else torch.ones_like(output) for i, output in enumerate(call.outputs)
                ]
                replay([Part.of(call, rows, everywhere)], learned)
        # The screen may have taken lists apart.
        return learned.known(call, batch) or [candidate_rows(leaf, batch, batch_dim)[0] for leaf in call.inputs]

    def _outputs(
        self,
        call: Call,
        paths: list[str],
        leaves: list[Tensor],
        rows: Tensor,
        inputs: Layout,
        batch_dim: int,
        learned: dict[str, Rows | None],
    ) -> Layout:
        layout: Layout = []
        other: dict[str, Tensor] | None = None
        sizes: set[int] | None = None
        for path, leaf in zip(paths, leaves, strict=True):
            known = learned.get(path)
            if leaf.dim() == 0 or isinstance(leaf, nn.Parameter) or (known is None and path in learned):
                layout.append(None)
            elif known is not None and leaf.dim() > known.axis and leaf.shape[known.axis] % len(rows) == 0:
                layout.append(blocks(known.axis, leaf.shape[known.axis] // len(rows), call.parts))
            elif self.one_pass or self.batch == 1:
                fits_axis = leaf.dim() > batch_dim and leaf.shape[batch_dim] % len(rows) == 0
                layout.append(blocks(batch_dim, leaf.shape[batch_dim] // len(rows), call.parts) if fits_axis else None)
            else:
                sizes = _other_sizes(call, inputs) if sizes is None else sizes
                axes = [axis for axis, size in enumerate(leaf.shape) if size == len(rows)]
                if axes == [batch_dim] and len(rows) not in sizes:
                    layout.append(Rows(batch_dim))
                    continue
                if other is None:
                    other = self._run_otherwise(call, rows, inputs, batch_dim)
                where = None if path not in other else self._rows_of(call, path, leaf, other[path], rows)
                learned[path] = where
                layout.append(where)
        return layout

    def _run_otherwise(self, call: Call, rows: Tensor, inputs: Layout, batch_dim: int) -> dict[str, Tensor]:
        """Outputs of one row more, without a graph: a copy of the first, so that nothing else changes."""
        more = torch.cat([rows, rows[:1]])
        # Where all were run no replay has told the readings apart: a mask of (T, T) with T = B raises if it is cut.
        others = layouts(call.inputs, self.batch, batch_dim) if len(rows) == self.batch else ()
        failure: Exception | None = None
        for layout in (inputs, *others):
            taken = [
                leaf if where is None else where.take(leaf, more.to(leaf.device))
                for leaf, where in zip(call.inputs, layout, strict=True)
            ]
            try:
                return self._outputs_of(call, taken)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                failure = failure or error
        raise RuntimeError(
            "gated: which axis of the outputs holds the rows could not be told: the model does not run on one row "
            "more. Give it a batch size that no other axis has, or leave preselect() away"
        ) from failure

    def _outputs_of(self, call: Call, inputs: list[Tensor]) -> dict[str, Tensor]:
        with torch.no_grad(), forked_rng(call.scene.rng), call.state.untouched():
            outputs = dict(zip(*flatten(call.run_again(inputs)[0]), strict=True))
            left = call.state.attributes.take().tensors()
            return outputs | {LEFT + path: tensor for path, tensor in left.items()}

    def _rows_of(self, call: Call, path: str, leaf: Tensor, other: Tensor, rows: Tensor) -> Rows | None:
        """Where an output keeps its rows, from another number of them; refuses rows in an order of their own."""
        where = rows_between(other.shape, leaf.shape, len(rows) + 1, len(rows), call.parts)
        drew = not same_rng_state(call.scene.rng, rng_state_now(call.scene.rng))
        if where is None or where.repeat == 1 or drew:
            return where
        first = torch.arange(len(rows), device=other.device)
        apart = (where.take(other, first) - leaf).detach().abs().max()
        if apart > call.scene.autocast.tolerance(leaf) * other.detach().abs().max():
            raise RuntimeError(
                f"gated: after preselect() the rows of output {path or 'of the model'} {tuple(leaf.shape)} could not "
                "be told: they are flattened in another order than the batch's. Return (B, T, ...) or (B * T, ...)."
            )
        return where


def _stretched(leaf: Tensor, length: int) -> Tensor:
    """A tensor whose last position on axis 1 is repeated, without a graph, up to a length."""
    more = length - leaf.shape[1]
    if not more:
        return leaf
    return torch.cat([leaf, leaf[:, -1:].detach().expand(-1, more, *leaf.shape[2:])], 1)


def _other_sizes(call: Call, inputs: Layout) -> set[int]:
    """Sizes that an axis of an output may have without any rows: of parameters, and of inputs' other axes."""
    sizes = {size for parameter in call.state.parameters() for size in parameter.shape}
    for leaf, where in zip(call.inputs, inputs, strict=True):
        sizes |= {size for axis, size in enumerate(leaf.shape) if where is None or axis != where.axis}
    return sizes


def _has_positions(shape: tuple[int, ...], tokens: int) -> bool:
    """Whether rows of an output have the tokens on their first axis, or on none."""
    return tokens == 1 or tokens not in shape[1:] or (shape[0] >= tokens and tokens not in shape)


def _doubtful(inputs: list[Tensor], candidates: list[Layout], batch_dim: int) -> bool:
    """Whether another reading than the likeliest is plausible: a mask of (T, T) where T is the batch size, say."""
    batched = [(leaf, options) for leaf, options in zip(inputs, candidates, strict=True) if options[0] is not None]
    if len(batched) == 1:
        return False
    first = next(leaf for leaf, options in batched if options[0] == Rows(batch_dim))
    return any(is_doubtful(options, batch_dim) or leaf.shape[1:2] != first.shape[1:2] for leaf, options in batched)


def _refuse_cut(path: str) -> Callable[[Tensor], None]:
    def hook(grad: Tensor) -> None:
        if grad.any():
            raise PrefixError(
                f"gated: unit='prefix': {path or 'the output'} gets a gradient and has no positions: it may need all "
                "of them (a pooled value?), and rows were cut. Use unit='token'"
            )

    return hook


def _refuse(path: str, batch: int) -> Callable[[Tensor], None]:
    def hook(_grad: Tensor) -> None:
        raise RuntimeError(no_batch_axis(path, batch))

    return hook
