"""Texts that follow each other in one row: which token is whose, cut and put together.

Knows tensors and nothing of gates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Role = Literal[
    "tokens", "positions", "bounds", "lengths", "ids", "mask", "block mask", "places", "texts", "longest", "shared"
]
"""What an input is to the texts: something of each token, its position in its text, where texts begin
(``cu_seqlens``), how long they are, which text each token belongs to, which tokens see each other (as a tensor, or as
what stands in for a ``BlockMask``), something of each place in a row, something of each text, the longest of their
lengths or more, or none of these."""


@dataclass(frozen=True)
class Segments:
    """S texts in rows of (B, T), the tokens of a row after those of the row before it.

    Attributes:
        rows: B.
        length: T.
        ids: (B * T,) the text of each token, in the order of the tokens; -1 for padding. On the host.
    """

    rows: int
    length: int
    ids: Tensor

    @classmethod
    def of_lengths(cls, rows: int, length: int, lengths: Tensor) -> "Segments | None":
        """From the lengths of the texts, which may leave padding at the end; None if they do not fit."""
        lengths = lengths.flatten().long().cpu()
        lengths = lengths[lengths > 0]
        total = int(lengths.sum())
        if not len(lengths) or total > rows * length or bool((lengths < 0).any()):
            return None
        ids = torch.full((rows * length,), -1, device="cpu")
        ids[:total] = torch.repeat_interleave(torch.arange(len(lengths), device="cpu"), lengths)
        return cls(rows, length, ids)

    @classmethod
    def of_marks(cls, rows: int, length: int, begins: Tensor, padding: Tensor | None = None) -> "Segments":
        """From which tokens begin a text, (B, T) bool, the first of a row always does; and which are padding."""
        begins = begins.cpu().clone()
        begins[:, 0] = True
        ids = begins.flatten().long().cumsum(0) - 1
        if padding is not None and bool(padding.any()):
            ids = torch.where(padding.flatten(), -1, ids)
            real = ids >= 0
            ids[real] = ids[real].unique_consecutive(return_inverse=True)[1]
        return cls(rows, length, ids)

    @cached_property
    def lengths(self) -> Tensor:
        """(S,) tokens of each text."""
        return torch.bincount(self.ids[self.ids >= 0])  # none of them is empty

    @cached_property
    def places(self) -> Tensor:
        """(B * T,) the position of each token in its text; 0 for padding."""
        starts = self.lengths.cumsum(0) - self.lengths
        real = self.ids >= 0
        order = torch.where(real, real.long().cumsum(0) - 1, 0)
        return torch.where(real, order - starts[self.ids.clamp_min(0)], 0)

    @cached_property
    def row_of(self) -> Tensor:
        """(S,) the row that each text begins in."""
        rows = torch.arange(len(self.ids), device="cpu") // self.length
        found = torch.zeros(len(self), dtype=torch.long, device="cpu")
        real = self.ids >= 0
        found[self.ids[real].flip(0)] = rows[real].flip(0)  # of a text that goes on in the next, the first
        return found

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def last(self) -> Tensor:
        """(S,) the index of the last token of each text."""
        index = (self.ids >= 0).nonzero().flatten()
        return torch.zeros_like(self.lengths).scatter_reduce_(0, self.ids[index], index, "amax")

    @cached_property
    def next(self) -> Tensor:
        """(S,) whose token follows the last of each text; -1 for padding, and where nothing follows."""
        return torch.cat([self.ids, self.ids.new_full((1,), -1)])[self.last + 1]

    def tokens(self, lengths: Tensor) -> Tensor:
        """(n,) indices of the first ``lengths`` tokens of each text, (S,), ascending."""
        flags = (self.ids >= 0) & (self.places < lengths.cpu()[self.ids.clamp_min(0)])
        return flags.nonzero().flatten()

    def filled(self, kept: Tensor) -> Tensor:
        """(B * T,) for each token one of the kept ones, (n,), to stand in its place: itself, if it is kept."""
        every = torch.arange(len(self.ids), device="cpu")
        found = kept[every % len(kept)]
        found[kept] = kept
        return found

    def by_text(self, values: Tensor, offset: int = 0) -> Tensor:
        """(S, L) values of each text's tokens from (B, P) of the positions from ``offset`` on; zero elsewhere."""
        if offset == 0 and values.shape[1] > self.length:  # several parts of an action at each position
            values = values.unflatten(1, (self.length, -1)).sum(2).to(values.dtype)
        full = values.new_zeros(self.rows, self.length)
        full[:, offset : offset + values.shape[1]] = values
        index = (self.ids >= 0).nonzero().flatten()
        found = values.new_zeros(len(self), int(self.lengths.max()))
        found[self.ids[index].to(values.device), self.places[index].to(values.device)] = full.flatten()[
            index.to(values.device)
        ]
        return found

    def by_token_any(self, values: Tensor) -> Tensor:
        """(S,) bool: whether anything of a text is not zero in (B, P, ...) of its tokens, of T or the first P."""
        flags = torch.zeros(self.rows, self.length, dtype=torch.bool, device="cpu")
        flags[:, : values.shape[1]] = values.ne(0).flatten(2).any(2).cpu() if values.dim() > 2 else values.ne(0).cpu()
        found = torch.zeros(len(self), dtype=torch.bool, device="cpu")
        found[self.ids[(self.ids >= 0) & flags.flatten()]] = True
        return found

    def by_token(self, values: Tensor) -> Tensor:
        """(B * T,) for each token what its text has, (S,), or what stands at its place, (S, L); zero for padding."""
        if values.dim() > 1 and values.shape[1] < (longest := int(self.lengths.max())):
            values = torch.nn.functional.pad(values, (0, longest - values.shape[1]))  # the last have none
        ids, places = self.ids.to(values.device), self.places.to(values.device)
        real = ids >= 0
        found = values[ids.clamp_min(0)] if values.dim() == 1 else values[ids.clamp_min(0), places]
        return torch.where(real, found, 0)


def stand_in(leaf: Tensor, segments: Segments, source: Tensor) -> Tensor:
    """An input of the tokens, in which each has what another one had, ``source`` (B * T,)."""
    flat, axis = _on_one_axis(leaf, segments)
    return flat.index_select(axis, source.to(leaf.device)).view(leaf.shape)


def put_tokens(full: Tensor, segments: Segments, tokens: Tensor, values: Tensor) -> Tensor:
    """What ``take_tokens`` gave of an input of the tokens, in its places in ``full``, which is written to."""
    flat, axis = _on_one_axis(full, segments)
    values = values if flat.dim() == full.dim() else values.squeeze(axis)
    return flat.index_copy_(axis, tokens.to(full.device), values).view(full.shape)


def _on_one_axis(leaf: Tensor, segments: Segments) -> tuple[Tensor, int]:
    """An input of the tokens with those of all rows on one axis, and that axis; a view where it can be."""
    axis = token_axis(leaf.shape, segments)
    assert axis is not None
    if segments.rows == 1 or leaf.shape[axis] == segments.rows * segments.length:
        return leaf, axis
    return leaf.flatten(axis - 1, axis), axis - 1


def take_tokens(leaf: Tensor, role: Role, segments: Segments, tokens: Tensor) -> Tensor:
    """An input with no other tokens than these, as one row.

    Args:
        leaf: the input.
        role: what it is.
        segments: its texts.
        tokens: (n,) ascending.
    """
    index = tokens.to(leaf.device)
    texts = segments.ids[tokens].unique_consecutive()
    if role in ("longest", "shared"):
        return leaf
    if role == "texts":
        return leaf.index_select(0, texts.to(leaf.device))
    if role in ("bounds", "lengths"):
        lengths = torch.bincount(segments.ids[tokens], minlength=len(segments))
        lengths = lengths[lengths > 0].to(leaf.device, leaf.dtype)
        shape = (*[1] * (leaf.dim() - 1), -1)
        if role == "lengths":
            return lengths.view(shape)
        return torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=leaf.dtype)]).view(shape)
    if role == "places":
        return leaf.index_select(list(leaf.shape).index(segments.length), index % segments.length)
    if role == "mask":
        return _blocks(leaf, segments, tokens)
    flat, axis = _on_one_axis(leaf, segments)
    taken = flat.index_select(axis, index)
    taken = taken if flat.dim() == leaf.dim() else taken.unsqueeze(axis)
    if role == "ids":  # neighbours must differ, also where texts of other rows had the same
        number = segments.ids[tokens].unique_consecutive(return_inverse=True)[1].to(leaf.device, leaf.dtype)
        return (number + int(taken.min() > 0)).view_as(taken)
    return taken


def _blocks(mask: Tensor, segments: Segments, tokens: Tensor) -> Tensor:
    """A mask of some tokens, in which those of one row see each other as they did, and no others."""
    index = tokens.to(mask.device)
    if segments.rows == 1:
        return mask.index_select(-1, index).index_select(-2, index)
    found = mask.new_full((1, *mask.shape[1:-2], len(tokens), len(tokens)), _nothing([mask]))
    row = index // segments.length
    for i in range(segments.rows):
        here, at = (row == i).nonzero().flatten(), index[row == i] % segments.length
        block = mask[i].index_select(-1, at).index_select(-2, at)
        found[0][..., here[:, None], here] = block
    return found


def _nothing(masks: Sequence[Tensor]) -> bool | float:
    """What a mask has where a token does not see another."""
    return False if masks[0].dtype == torch.bool else min(float(mask.min()) for mask in masks)


def token_axis(shape: Sequence[int], segments: Segments) -> int | None:
    """The first axis of the tokens: of T after one of B, or of all B * T; None if there is none."""
    b, t = segments.rows, segments.length
    for axis, size in enumerate(shape):
        if size == t and axis and shape[axis - 1] == b:
            return axis
    return next((axis for axis, size in enumerate(shape) if size == b * t), None)


def put_together(leaves: Sequence[Tensor], role: Role, segments: Sequence[Segments], like: Sequence[Tensor]) -> Tensor:
    """Inputs that ``take_tokens`` gave, of several calls, as one row.

    Args:
        leaves: the inputs.
        role: what they are.
        segments: the texts of each call.
        like: the inputs as they were, which tell their axis of tokens.
    """
    first = leaves[0]
    if role == "shared" or len(leaves) == 1:
        return first
    if role == "longest":
        return torch.stack(list(leaves)).amax()
    if role == "lengths":
        return torch.cat(list(leaves), -1)
    if role == "texts":
        return torch.cat(list(leaves), 0)
    if role == "places":
        return torch.cat(list(leaves), list(like[0].shape).index(segments[0].length))
    if role == "bounds":
        lengths = torch.cat([leaf.flatten().diff() for leaf in leaves])
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=first.dtype)])
        return bounds.view(*[1] * (first.dim() - 1), -1)
    if role == "mask":
        total = sum(leaf.shape[-1] for leaf in leaves)
        joined = first.new_full((*first.shape[:-2], total, total), _nothing(leaves))
        start = 0
        for leaf in leaves:
            end = start + leaf.shape[-1]
            joined[..., start:end, start:end] = leaf
            start = end
        return joined
    axis = token_axis(like[0].shape, segments[0])
    assert axis is not None
    if role == "ids":  # neighbours must differ
        shifted, above = [], 0
        for leaf in leaves:
            shifted.append(leaf + (above - int(leaf.min())))
            above = int(shifted[-1].max()) + 1
        leaves = shifted
    return torch.cat(list(leaves), axis)
