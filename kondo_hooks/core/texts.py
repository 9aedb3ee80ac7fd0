"""Rows that hold many texts, recognised from what a call is given.

Large trainers pack: ids of (1, total), and beside them what says where texts begin. Then texts are the samples.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kondo_hooks.core.call import Call
from kondo_hooks.errors import PackError
from kondo_hooks.rows.block_masks import block_mask_of, dense_rows
from kondo_hooks.rows.conventions import BOUNDS, IDS, LENGTHS, POSITIONS, name_in, says_longest, tells_texts
from kondo_hooks.rows.segments import Role, Segments, token_axis

Named = str | Callable[..., Any] | Literal[False] | None
"""The input that tells texts, a function of the call that gives their lengths, or False: rows are the samples."""

_FORBIDDEN = -1e8  # an additive mask: what is below is not seen


@dataclass(frozen=True)
class Texts:
    """The texts in a call's rows, and what each input is to them."""

    segments: Segments
    roles: tuple[Role, ...]

    def __len__(self) -> int:
        return len(self.segments)

    def is_same(self, other: "Texts | None") -> bool:
        """Whether another call has its texts in the same places."""
        mine = self.segments
        return other is not None and mine.rows == other.segments.rows and torch.equal(mine.ids, other.segments.ids)


def find_texts(call: Call, named: Named = None) -> Texts | None:
    """The texts that a call's rows hold; None where a row is one text.

    Args:
        call: not yet run, or screened.
        named: what tells; by default it is known by its name.

    Raises:
        PackError: if what the user named does not tell.
    """
    if named is False or call.pairs or not call.inputs:
        return None
    inputs = dict(zip(_names(call), call.inputs, strict=True))
    if named is None and not _may_tell(inputs):
        return None
    shape = _rows_of_tokens(call, inputs)
    if shape is None:
        if named is not None:
            raise PackError(f"gated: segments={_told(named)}: no input of the call has rows of tokens, (B, T)")
        return None
    if named is not None:
        return _named(call, named, inputs, shape)
    mask = inputs.get("attention_mask")
    padding = None if mask is None or tuple(mask.shape) != shape else (mask == 0).cpu()
    for names, read in ((BOUNDS, _from_bounds), (LENGTHS, _from_lengths), (IDS, _from_ids)):
        for name in names:
            if name in inputs and (found := read(inputs[name], shape)) is not None:
                return _several(call, found)
    for name in POSITIONS:
        if name in inputs and (found := _from_positions(inputs[name], shape, padding)) is not None:
            return _several(call, found)
    for leaf in call.inputs if shape[0] == 1 else ():
        if leaf.dim() == 4 and (found := _from_mask(leaf, shape)) is not None:
            return _several(call, found)
        if (mask := block_mask_of(leaf)) is not None and tuple(mask.shape[-2:]) == (shape[1], shape[1]):
            return _several(call, _from_rows(dense_rows(mask), shape[1]))
    return None


def _may_tell(inputs: dict[str, Tensor]) -> bool:
    if any(map(tells_texts, inputs)):
        return True
    return any(leaf.dim() == 4 or block_mask_of(leaf) is not None for leaf in inputs.values())


def _named(call: Call, named: str | Callable[..., Any], inputs: dict[str, Tensor], shape: tuple[int, int]) -> Texts:
    if callable(named):
        lengths = torch.as_tensor(named(*call.args[0], **call.args[1]), device="cpu")
        found = Segments.of_lengths(*shape, lengths)
        if found is None:
            raise PackError(f"gated: segments={_told(named)}: {lengths.tolist()} are no lengths of texts in {shape}")
        return Texts(found, _roles(call, found))
    if named not in inputs:
        raise PackError(f"gated: segments={named!r} is no input of the call; it has {sorted(inputs)}")
    readers: tuple[tuple[Any, Role], ...] = (
        *((_from_bounds, "bounds"), (_from_lengths, "lengths"), (_from_positions, "positions"), (_from_ids, "ids")),
    )
    for read, role in readers:
        found = read(inputs[named], shape)
        if found is not None:
            return Texts(found, _roles(call, found, {named: role}))
    raise PackError(f"gated: segments={named!r} does not tell texts in rows of {shape}")


def _several(call: Call, found: Segments) -> Texts | None:
    """None where each row is one text, as ever."""
    several = bool((torch.bincount(found.row_of, minlength=found.rows) > 1).any()) if len(found) else False
    return Texts(found, _roles(call, found)) if several else None


def _names(call: Call) -> list[str]:
    """Of each input, as the forward calls it, or the dictionary or object that it stands in."""
    given = None
    names = []
    for path in call.input_paths:
        place = re.fullmatch(r"\[0\]\[(\d+)\]", path)
        if place is None:
            names.append(name_in(path))
            continue
        given = _positional(call.run) if given is None else given
        at = int(place[1])
        names.append(given[at] if at < len(given) else path)
    return names


def _positional(run: Callable[..., Any]) -> Sequence[str]:
    """The names of a function's arguments by position; a wrapper's, which names none, are those of its module."""
    module = getattr(run, "__self__", None)
    if not isinstance(module, nn.Module):
        return _signature(run)
    names = _signature(getattr(run, "__func__", run))[1:]
    while not names and isinstance(module, nn.Module):
        names, module = _signature(type(module).forward)[1:], getattr(module, "module", None)
    return names


@functools.lru_cache(256)
def _signature(function: Callable[..., Any]) -> Sequence[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def _told(named: Any) -> str:
    return repr(named) if isinstance(named, str) else getattr(named, "__name__", "a function")


def _rows_of_tokens(call: Call, inputs: dict[str, Tensor]) -> tuple[int, int] | None:
    """(B, T) of the ids, or of embeddings: the first input of that shape."""
    for name in ("input_ids", "inputs_embeds", "input"):
        if name in inputs and inputs[name].dim() >= 2:
            return inputs[name].shape[0], inputs[name].shape[1]
    leaf = next((leaf for leaf in call.arguments if leaf.dim() in (2, 3)), None)
    return None if leaf is None else (leaf.shape[0], leaf.shape[1])


def _from_bounds(leaf: Tensor, shape: tuple[int, int]) -> Segments | None:
    if leaf.dim() != 1 or len(leaf) < 2 or leaf.is_floating_point():
        return None
    bounds = leaf.cpu().long()
    if int(bounds[0]) or bool((bounds.diff() < 0).any()) or int(bounds[-1]) > shape[0] * shape[1]:
        return None
    return Segments.of_lengths(*shape, bounds.diff())


def _from_lengths(leaf: Tensor, shape: tuple[int, int]) -> Segments | None:
    """The lengths of a padded batch, one a row, are no texts of a pack: those fill it."""
    lengths = leaf.cpu().long().flatten()
    if leaf.dim() > 2 or leaf.is_floating_point() or int(lengths.sum()) != shape[0] * shape[1]:
        return None
    return Segments.of_lengths(*shape, lengths)


def _from_ids(leaf: Tensor, shape: tuple[int, int]) -> Segments | None:
    """A negative id is padding; so is 0 at the end of a row whose texts are counted from 1."""
    if tuple(leaf.shape) != shape or leaf.is_floating_point():
        return None
    ids = leaf.cpu().long()
    at_the_end = (ids != 0).flip(1).cumsum(1).flip(1) == 0
    padding = (ids < 0) | (at_the_end & (ids[:, :1] > 0))
    return Segments.of_marks(*shape, ids != ids.roll(1, 1), padding)


def _from_positions(leaf: Tensor, shape: tuple[int, int], padding: Tensor | None = None) -> Segments | None:
    """Texts begin where positions start again at zero; each goes on by one. Zeros after zeros are padding."""
    leaf = leaf[0] if leaf.dim() == 3 else leaf
    if leaf.dim() != 2 or leaf.shape[1] != shape[1] or leaf.shape[0] not in (1, shape[0]) or leaf.is_floating_point():
        return None
    positions = leaf.cpu().long().expand(shape)
    padding = torch.zeros(shape, dtype=torch.bool, device="cpu") if padding is None else padding
    begins, real = positions == 0, ~padding
    steps = positions[:, 1:] == positions[:, :-1] + 1
    if not bool((begins | padding)[:, 0].all()) or not bool((begins[:, 1:] | steps | padding[:, 1:]).all()):
        return None
    begins = begins & real
    begins[:, 1:] |= real[:, 1:] & padding[:, :-1]
    return Segments.of_marks(*shape, begins, padding | _idle(begins & real))


def _idle(begins: Tensor) -> Tensor:
    """Of several texts of one token in a row, which are padding: all but one that others follow."""
    alone = begins & torch.nn.functional.pad(begins[:, 1:], (0, 1), value=True)
    before, after = (torch.zeros_like(alone) for _ in range(2))
    before[:, 1:], after[:, :-1] = alone[:, :-1], alone[:, 1:]
    return alone & (before | after)


def _from_mask(leaf: Tensor, shape: tuple[int, int]) -> Segments | None:
    """A mask (1, H, T, T) whose blocks on the diagonal are texts: no token sees one of another block."""
    if tuple(leaf.shape[-2:]) != (shape[1], shape[1]) or leaf.shape[0] != 1:
        return None
    mask = leaf[0, 0].cpu()
    sees = mask > max(_FORBIDDEN, torch.finfo(mask.dtype).min / 2) if mask.is_floating_point() else mask != 0
    return _from_rows([sees], shape[1])


def _from_rows(sees: Iterable[Tensor], length: int) -> Segments:
    """From which tokens each of one row sees, (n, T) bool, some tokens at a time."""
    place = torch.arange(length, device="cpu")
    ends = []
    for some in sees:
        at = place.to(some.device)
        ends.append(torch.stack([torch.where(some, at, length).amin(1), torch.where(some, at, -1).amax(1)]).cpu())
    first, last = torch.cat(ends, 1)  # of those that each token sees
    first = torch.minimum(first, place).flip(0).cummin(0).values.flip(0)
    reached = torch.maximum(last, place).cummax(0).values
    begins = (first == place) & torch.cat([reached.new_full((1,), -1), reached[:-1]]).lt(place)
    return Segments.of_marks(1, length, begins[None], _idle(begins[None]))


def _roles(call: Call, segments: Segments, told: dict[str, Role] | None = None) -> tuple[Role, ...]:
    """What each input is, as it was told, by its name, by its values and by its shape."""
    roles: list[Role] = []
    lengths, t = segments.lengths, segments.length
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    for name, leaf in zip(_names(call), call.inputs, strict=True):
        has_tokens = token_axis(leaf.shape, segments) is not None
        counts = not leaf.is_floating_point() and leaf.dtype != torch.bool and leaf.dim() in (1, 2)
        role: Role = "shared"
        if told and name in told:
            role = told[name]
        elif leaf.dim() == 0 and not leaf.is_floating_point() and says_longest(name):
            role = "longest"
        elif block_mask_of(leaf) is not None:
            role = "block mask"
        elif (name in BOUNDS and leaf.dim() == 1) or (counts and _equals(leaf, bounds)):
            role = "bounds"
        elif name in LENGTHS or (counts and _equals(leaf, lengths)):
            role = "lengths"
        elif name in IDS and has_tokens:
            role = "ids"
        elif _is_mask(name, leaf, t) and (segments.rows == 1 or leaf.shape[0] == segments.rows):
            role = "mask"
        elif has_tokens:
            role = "positions" if name in POSITIONS else "tokens"
        elif segments.rows > 1 and t in leaf.shape[:2] and leaf.dim() > 1:
            role = "places"
        elif leaf.dim() and leaf.shape[0] == len(lengths) > 1:
            role = "texts"
        roles.append(role)
    return tuple(roles)


def _is_mask(name: str, leaf: Tensor, length: int) -> bool:
    """Whether it is of pairs of tokens, and not of tokens with as many features."""
    looks = leaf.dim() in (2, 4) or leaf.dtype == torch.bool or "mask" in name
    return looks and leaf.dim() >= 2 and leaf.shape[-2:] == (length, length)


def _equals(leaf: Tensor, values: Tensor) -> bool:
    if leaf.numel() != len(values) or max(leaf.shape) != len(values):
        return False
    return torch.equal(leaf.flatten().cpu().long(), values)
