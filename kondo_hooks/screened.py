"""The screen-first route: delight was known before the forward, so only the kept rows run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kondo_hooks.batch import Rows, Tree, candidate_rows, flatten, output_rows, unflatten


class _Spread(torch.autograd.Function):
    """Kept rows in a full-size tensor; dropped rows copy the first kept one and send no gradient back."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, where: Rows, rows: Tensor, source: Tensor, factors: Tensor | None) -> Tensor:
        ctx.where, ctx.rows, ctx.factors = where, rows, factors
        return where.take(kept, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.where.take(grad, ctx.rows)
        if ctx.factors is not None:
            kept = ctx.where.weighted(kept, ctx.factors)
        return kept, None, None, None, None


@dataclass
class Screened:
    """A decision that waits for its call.

    Attributes:
        factors: (B,) or (B, T) factors on the gradients, 0 where dropped.
    """

    factors: Tensor

    def run(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], batch_dim: int) -> Tree:
        """Call the model on the kept rows, with a graph; returns its outputs in full size."""
        batch = len(self.factors)
        inputs = flatten((args, kwargs))[1]
        layout = [candidate_rows(leaf, batch, batch_dim)[0] for leaf in inputs]
        if not any(layout):
            shapes = [tuple(leaf.shape) for leaf in inputs]
            raise ValueError(
                f"gated: screen() was given {batch} rows, but no input of the call has a batch axis of that size "
                f"(inputs: {shapes})"
            )
        kept = self.factors if self.factors.dim() == 1 else self.factors.ne(0).any(1)
        rows = kept.nonzero().flatten()
        # Nothing kept: one row stands in with a gradient of zero, so that parameters get zero and not None.
        rows = rows if len(rows) else rows.new_zeros(1)
        source = torch.zeros(batch, dtype=torch.long, device=rows.device)
        source[rows] = torch.arange(len(rows), device=rows.device)
        factors = self.factors[rows]
        weights = None if bool((factors == 1).all()) else factors
        self.forwarded = len(rows)
        taken = [
            leaf if where is None else where.take(leaf, rows.to(leaf.device))
            for leaf, where in zip(inputs, layout, strict=True)
        ]
        args, kwargs = unflatten((args, kwargs), taken)
        result = original(*args, **kwargs)
        spread = []
        for path, leaf in zip(*flatten(result), strict=True):
            where = output_rows(leaf, len(rows), batch_dim)
            if where is None:
                if leaf.requires_grad:
                    leaf.register_hook(_refuse(path, batch))
                spread.append(leaf)
                continue
            index, origin = rows.to(leaf.device), source.to(leaf.device)
            gains = None if weights is None else weights.to(leaf.device)
            spread.append(_Spread.apply(leaf, where, index, origin, gains))
        return unflatten(result, spread)


def _refuse(path: str, batch: int) -> Callable[[Tensor], None]:
    def hook(_grad: Tensor) -> None:
        raise RuntimeError(no_batch_axis(path, batch))

    return hook


def no_batch_axis(path: str, batch: int) -> str:
    """The message for a loss that uses an output which has no rows."""
    return (
        f"gated: the loss uses output {path or 'of the model'}, which has no batch axis of size {batch}, so its "
        "gradient cannot be split into rows. Compute scalar losses outside the model, expand per-model values "
        "(a log_std, say) to the batch inside it, or call it on a batch (x.unsqueeze(0))."
    )
