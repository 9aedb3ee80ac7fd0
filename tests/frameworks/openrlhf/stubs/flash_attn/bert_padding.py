"""Rows of several lengths put one after another, and back."""

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["index_first_axis", "pad_input", "rearrange", "unpad_input"]


def index_first_axis(tensor: Tensor, indices: Tensor) -> Tensor:
    """Some entries of the first axis."""
    return tensor[indices]


def unpad_input(tensor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The unmasked entries of (B, T, ...), where they stood in (B * T), bounds, the longest, lengths."""
    lengths = mask.sum(-1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    bounds = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return tensor.flatten(0, 1)[indices], indices, bounds, int(lengths.max()), lengths


def pad_input(tensor: Tensor, indices: Tensor, batch: int, length: int) -> Tensor:
    """The inverse: (B, T, ...), zero where nothing stood."""
    whole = tensor.new_zeros(batch * length, *tensor.shape[1:])
    return whole.index_copy(0, indices, tensor).view(batch, length, *tensor.shape[1:])
