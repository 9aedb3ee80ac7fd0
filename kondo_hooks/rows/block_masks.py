"""The masks of flex attention, as a tensor that has their rows and tokens, and back.

A ``BlockMask`` is a function of places and what it says of blocks of them, so it cannot be indexed. What stands in for
it holds for each token which mask it comes from and where it stood there; of fewer tokens, or of those of several
calls, a new mask is made that looks there.
"""

import itertools
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kondo_hooks.rows.encoded import Encoded

_ROW, _MASK = 24, 40
"""Bits of a code below the row's and below the mask's number: T < 2^24, B < 2^16."""
_AT_ONCE = 2**24  # pairs of tokens
_serial = itertools.count(1)
_masks: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()


def is_block_mask(value: Any) -> bool:
    """Whether it is a mask of flex attention; that module is imported by whoever made one."""
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    return flex is not None and type(value) is flex.BlockMask


def encode_block_mask(mask: Any) -> Encoded | None:
    """(B, T) codes of a mask's tokens; None of one that is not of (B, H, T, T), which is not cut."""
    if not is_block_mask(mask) or len(mask.shape) != 4 or mask.shape[2] != mask.shape[3]:
        return None
    rows, heads, length, _ = mask.shape
    number = next(_serial) % 2**22
    _masks[number] = mask
    place = torch.arange(length, device=mask.kv_num_blocks.device)
    row = torch.arange(rows, device=place.device)
    part = (number << _MASK) + (row[:, None] << _ROW) + place

    def decode(part: Tensor, memo: dict[Any, Any]) -> Any:
        made = memo.get(("block mask", id(part)))
        if made is None:
            made = memo["block mask", id(part)] = _made_of(part, heads, mask.BLOCK_SIZE)
        return made

    return Encoded(part, decode, ("block mask", heads, tuple(mask.BLOCK_SIZE)))


def block_mask_of(part: Tensor) -> Any:
    """The mask that a tensor stands in for; None if it stands for none."""
    if not _masks or part.dtype != torch.long or part.dim() != 2 or not part.numel():
        return None
    mask = _masks.get(int(part[0, 0]) >> _MASK)
    return mask if mask is not None and part.shape == (mask.shape[0], mask.shape[2]) else None


def dense_rows(mask: Any) -> Iterator[Tensor]:
    """Which tokens each sees, (n, T) bool, some rows at a time, of the first row of the batch and the first head."""
    from torch.nn.attention.flex_attention import create_mask

    length, device = mask.shape[-1], mask.kv_num_blocks.device
    step = max(1, _AT_ONCE // length)

    def some(first: int) -> Tensor:
        def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return mask.mask_mod(b, h, q + first, kv)

        return create_mask(sees, 1, 1, min(step, length - first), length, device=device)[0, 0]

    return map(some, range(0, length, step))


def _made_of(part: Tensor, heads: int, block_size: tuple[int, int]) -> Any:
    """A mask in which tokens of one row of one call see each other as they did; padding sees itself."""
    from torch.nn.attention.flex_attention import create_block_mask

    numbers = (part >> _MASK).unique().tolist()
    masks = [(number, _masks[number].mask_mod) for number in numbers if number]
    number, row, place = part >> _MASK, (part >> _ROW) & (2**16 - 1), part & (2**_ROW - 1)

    def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        allowed = (q == kv) & (number[b, q] == 0)
        for n, mask_mod in masks:
            here = (number[b, q] == n) & (number[b, kv] == n) & (row[b, q] == row[b, kv])
            mine, theirs, of = (torch.where(here, t, 0) for t in (place[b, q], place[b, kv], row[b, q]))
            allowed = allowed | (here & mask_mod(of, h, mine, theirs))
        return allowed

    rows, length = part.shape
    return create_block_mask(sees, rows, heads, length, length, device=part.device, BLOCK_SIZE=block_size)
