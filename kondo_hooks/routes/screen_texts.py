"""The screen-first route where rows hold many texts: the kept texts run as a shorter pack, with a graph."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kondo_hooks.core.call import Call
from kondo_hooks.core.packs import Packed
from kondo_hooks.core.texts import Texts
from kondo_hooks.errors import PackError, met_rows_not_run, predicts_padding
from kondo_hooks.rows.segments import take_tokens
from kondo_hooks.rows.tree import Tree, flatten, unflatten


class _Scatter(torch.autograd.Function):
    """Tokens of a shorter pack where they stand in the whole one; others copy the first, and send nothing back."""

    @staticmethod
    def forward(
        ctx: Any,
        kept: Tensor,
        shape: tuple[int, ...],
        tokens: Tensor,
        source: Tensor,
        weights: Tensor,
        before_padding: Tensor,
        path: str,
    ) -> Tensor:
        ctx.tokens, ctx.weights, ctx.before_padding, ctx.path = tokens, weights, before_padding, path
        ctx.kondo_rows = True
        return kept[0][source.view(shape[:2])]  # no view, so that the loss code may write to it

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.flatten(0, 1)
        if len(ctx.before_padding) and bool(grad.index_select(0, ctx.before_padding).any()):
            raise predicts_padding(ctx.path)
        parameter = getattr(ctx, "kondo_met", None)
        if parameter is not None and bool(grad.index_fill(0, ctx.tokens, 0).any()):
            raise RuntimeError(met_rows_not_run(parameter))
        kept = grad.index_select(0, ctx.tokens)
        kept = kept * ctx.weights.to(kept.dtype).view(-1, *[1] * (kept.dim() - 1))
        return kept[None], *[None] * 6


def find_outputs(
    call: Call, texts: Texts, packed: Packed, run: Callable[[list[Tensor]], dict[str, Tensor]]
) -> dict[str, int]:
    """Which outputs have tokens, and by how many they are shorter where labels are shifted: those that are as long as
    the texts, whichever run. One run without a graph tells."""
    segments = texts.segments
    sizes = segments.lengths
    other = int(sizes.argmin())
    if len(packed) == 1 and int(sizes[packed.kept[0]]) == int(sizes[other]):
        several = torch.arange(len(texts), device="cpu")  # another number of tokens than are kept
    else:
        several = torch.tensor([other], device="cpu")
    tokens = Packed(texts, several, None).tokens()
    found = run(
        [take_tokens(leaf, role, segments, tokens) for leaf, role in zip(call.inputs, texts.roles, strict=True)]
    )
    return {
        path: len(tokens) - leaf.shape[1]
        for path, leaf in found.items()
        if leaf.dim() > 1 and 0 <= len(tokens) - leaf.shape[1] <= (segments.rows == 1)
    }


def run_texts(
    call: Call,
    texts: Texts,
    packed: Packed,
    run: Callable[[list[Tensor]], Tree],
    known: dict[str, int] | None,
) -> Tree:
    """Run the kept texts; returns what the model returned, in the size of the whole pack.

    Args:
        call: the call, not yet run.
        texts: all of them.
        packed: those that are kept, at least one.
        run: runs the model on inputs.
        known: the outputs that have tokens; None where that was not looked for, and shapes tell.

    Raises:
        PackError: once the loss uses an output that has no tokens.
    """
    segments = texts.segments
    if segments.rows == 1 and (known is None or any(known.values())):
        packed = replace(packed, followed=segments.next >= 0)  # what their last tokens predict may be used
    tokens = packed.tokens()
    inputs = [take_tokens(leaf, role, segments, tokens) for leaf, role in zip(call.inputs, texts.roles, strict=True)]
    result = run(inputs)
    paths, leaves = flatten(result)
    spread = []
    for path, leaf in zip(paths, leaves, strict=True):
        less = len(tokens) - leaf.shape[1] if leaf.dim() > 1 and leaf.shape[0] == 1 else -1
        has_tokens = known is None or path in known
        if not has_tokens or less not in ((0, 1) if segments.rows == 1 else (0,)):
            if leaf.requires_grad:
                leaf = leaf.view_as(leaf)
                leaf.register_hook(_refuse(path or "the output", tuple(leaf.shape)))
            spread.append(leaf)
            continue
        length = segments.length - less
        mine = (tokens if not less else tokens[:-1]).to(leaf.device)
        source = torch.zeros(segments.rows * length, dtype=torch.long, device=leaf.device)
        source[mine] = torch.arange(len(mine), device=leaf.device)
        weights, last = packed.weights(leaf.device), segments.last.to(leaf.device)
        last = last[(segments.next < 0).to(leaf.device) & (last < length) & (weights[last] != 0)] if less else last[:0]
        shape = (segments.rows, length, *leaf.shape[2:])
        spread.append(_Scatter.apply(leaf, shape, mine, source, weights[mine], last, path or "the output"))
    return unflatten(result, spread)


def _refuse(path: str, shape: tuple[int, ...]) -> Callable[[Tensor], None]:
    def hook(grad: Tensor) -> None:
        if grad.any():
            raise PackError(
                f"gated: {path} {shape} gets a gradient and has no tokens, and the kept texts ran alone: return it as "
                "(B, T, ...), or leave preselect() away"
            )

    return hook
