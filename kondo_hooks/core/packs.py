"""Rows that hold many texts: recognised from what a call is given, cut to the kept texts, and put together.

Large trainers pack: ids of (1, total), and beside them what says where texts begin. Then texts are the samples, and a
replay is a shorter pack.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kondo_hooks.core.call import Call
from kondo_hooks.core.compact import RankOne
from kondo_hooks.core.kept_rows import Held, Part, same_constants, same_structure, same_values
from kondo_hooks.errors import PackError
from kondo_hooks.rows.axes import Rows
from kondo_hooks.rows.segments import Role, Segments, put_together, stand_in, take_tokens, token_axis

_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seq_lens", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k")
_LENGTHS = ("seq_lens", "seqlens", "doc_lens")
_IDS = ("seq_idx", "sequence_ids", "document_ids", "segment_ids")
_POSITIONS = ("position_ids", "positions")


@dataclass(frozen=True)
class Texts:
    """The texts in a call's rows, and what each input is to them."""

    segments: Segments
    roles: tuple[Role, ...]

    def __len__(self) -> int:
        return len(self.segments)


def find_texts(call: Call, named: str | Callable[..., Any] | None = None) -> Texts | None:
    """The texts that a call's rows hold; None where a row is one text.

    Args:
        call: screened.
        named: the input that tells, or a function of the call's arguments that gives the lengths; by default what
            tells is known by its name.

    Raises:
        PackError: if what the user named does not tell.
    """
    inputs = {_name(path): i for i, path in enumerate(call.input_paths)}
    shape = _rows_of_tokens(call)
    if shape is None:
        if named is not None:
            raise PackError(f"gated: segments={_told(named)}: no input of the call has rows of tokens, (B, T)")
        return None
    if callable(named):
        lengths = torch.as_tensor(named(*call.args[0], **call.args[1]), device="cpu")
        found = Segments.of_lengths(*shape, lengths)
        if found is None:
            raise PackError(f"gated: segments={_told(named)}: {lengths.tolist()} are no lengths of texts in {shape}")
        return Texts(found, _roles(call, found))
    if named is not None:
        if named not in inputs:
            raise PackError(f"gated: segments={named!r} is no input of the call; it has {sorted(inputs)}")
        found = _from(call.inputs[inputs[named]], shape)
        if found is None:
            raise PackError(f"gated: segments={named!r} does not tell texts in rows of {shape}")
        return Texts(found, _roles(call, found))
    for names, read in ((_BOUNDS, _from_bounds), (_LENGTHS, _from_lengths), (_IDS, _from_ids)):
        for name in names:
            if name in inputs and (found := read(call.inputs[inputs[name]], shape)) is not None:
                return _several(call, found)
    for name in _POSITIONS:
        if name in inputs and not _pads(call, inputs, shape):
            found = _from_positions(call.inputs[inputs[name]], shape)
            if found is not None:
                return _several(call, found)
    for i, leaf in enumerate(call.inputs):
        if leaf.dim() == 4 and shape[0] == 1 and (found := _from_mask(leaf, shape)) is not None and i >= 0:
            return _several(call, found)
    return None


def _several(call: Call, found: Segments) -> Texts | None:
    """None where each row is one text, as ever."""
    return Texts(found, _roles(call, found)) if len(found) > found.rows else None


def _name(path: str) -> str:
    found = re.findall(r"\[?'(\w+)'\]?|\.(\w+)", path)
    return next((a or b for a, b in reversed(found)), path)


def _told(named: Any) -> str:
    return repr(named) if isinstance(named, str) else getattr(named, "__name__", "a function")


def _rows_of_tokens(call: Call) -> tuple[int, int] | None:
    """(B, T) of the ids, or of embeddings: the first input of that shape."""
    if call.batch_dim or call.pairs:
        return None  # a mask that comes first is no tokens, but tells no texts either
    names = {_name(path): leaf for path, leaf in zip(call.input_paths, call.inputs, strict=True)}
    for name in ("input_ids", "inputs_embeds", "input"):
        if name in names and names[name].dim() >= 2:
            return names[name].shape[0], names[name].shape[1]
    leaf = next((leaf for leaf in call.arguments if leaf.dim() in (2, 3)), None)
    return None if leaf is None else (leaf.shape[0], leaf.shape[1])


def _from(leaf: Tensor, shape: tuple[int, int]) -> Segments | None:
    """By its values: where texts begin, how long they are, their positions, or which text a token is of."""
    for read in (_from_bounds, _from_lengths, _from_positions, _from_ids):
        if (found := read(leaf, shape)) is not None:
            return found
    return None


def _from_bounds(leaf: Tensor, shape: tuple[int, int]) -> Segments | None:
    if leaf.dim() != 1 or len(leaf) < 2 or leaf.is_floating_point():
        return None
    bounds = leaf.cpu().long()
    if int(bounds[0]) or bool((bounds.diff() < 0).any()) or int(bounds[-1]) > shape[0] * shape[1]:
        return None
    return Segments.of_lengths(*shape, bounds.diff())


def _from_lengths(leaf: Tensor, shape: tuple[int, int]) -> Segments | None:
    lengths = leaf.cpu().long().flatten()
    if leaf.dim() > 2 or leaf.is_floating_point() or int(lengths.sum()) != shape[0] * shape[1]:
        return None
    return Segments.of_lengths(*shape, lengths)


def _from_ids(leaf: Tensor, shape: tuple[int, int]) -> Segments | None:
    if tuple(leaf.shape) != shape or leaf.is_floating_point():
        return None
    ids = leaf.cpu()
    return Segments.of_marks(*shape, ids != ids.roll(1, 1))


def _from_positions(leaf: Tensor, shape: tuple[int, int]) -> Segments | None:
    """Texts begin where positions start again at zero; each goes on by one."""
    leaf = leaf[0] if leaf.dim() == 3 else leaf
    if leaf.dim() != 2 or leaf.shape[1] != shape[1] or leaf.shape[0] not in (1, shape[0]) or leaf.is_floating_point():
        return None
    positions = leaf.cpu().long().expand(shape)
    begins = positions == 0
    steps = positions[:, 1:] == positions[:, :-1] + 1
    if not bool((begins[:, 1:] | steps).all()) or not bool(begins[:, 0].all()):
        return None
    return Segments.of_marks(*shape, begins)


def _from_mask(leaf: Tensor, shape: tuple[int, int]) -> Segments | None:
    """A mask (1, 1, T, T) whose blocks on the diagonal are texts: no token sees one of another block."""
    if tuple(leaf.shape[-2:]) != (shape[1], shape[1]) or leaf.shape[0] != 1:
        return None
    mask = leaf[0, 0]
    sees = (
        mask
        if mask.dtype == torch.bool
        else mask > torch.finfo(mask.dtype).min / 2
        if mask.is_floating_point()
        else mask != 0
    )
    place = torch.arange(shape[1], device=mask.device)
    first = torch.where(sees, place, shape[1]).amin(1)  # the first that each token sees
    last = torch.where(sees, place, -1).amax(1)
    first = torch.minimum(first, place).flip(0).cummin(0).values.flip(0)
    reached = torch.maximum(last, place).cummax(0).values
    begins = (first == place) & torch.cat([reached.new_full((1,), -1), reached[:-1]]).lt(place)
    return Segments.of_marks(*shape, begins[None])


def _pads(call: Call, inputs: dict[str, int], shape: tuple[int, int]) -> bool:
    """Whether a mask of (B, T) says that tokens are padding: then positions that start again do so before a text."""
    if "attention_mask" not in inputs:
        return False
    mask = call.inputs[inputs["attention_mask"]]
    return tuple(mask.shape) == shape and bool((mask == 0).any())


def _roles(call: Call, segments: Segments) -> tuple[Role, ...]:
    roles: list[Role] = []
    for path, leaf in zip(call.input_paths, call.inputs, strict=True):
        name, t = _name(path), segments.length
        if name in _BOUNDS and leaf.dim() == 1:
            roles.append("bounds")
        elif name in _LENGTHS:
            roles.append("lengths")
        elif name in _IDS and token_axis(leaf.shape, segments) is not None:
            roles.append("ids")
        elif (
            leaf.dim() >= 2 and tuple(leaf.shape[-2:]) == (t, t) and leaf.shape[:-2].numel() == 1 and segments.rows == 1
        ):
            roles.append("mask")
        else:
            roles.append("shared" if token_axis(leaf.shape, segments) is None else "tokens")
    return tuple(roles)


@dataclass(frozen=True)
class Packed:
    """Texts of one call that are to be replayed.

    Attributes:
        texts: all of them.
        kept: (n,) which, ascending.
        factors: (n,) on their gradients, or (n, L) on their tokens'; None where all are one.
        cuts: whether each goes no further than to its last token with a factor.
    """

    texts: Texts
    kept: Tensor
    factors: Tensor | None
    cuts: bool = False

    def __len__(self) -> int:
        return len(self.kept)

    def between(self, first: int, last: int) -> "Packed":
        """Some of its texts, by position."""
        factors = None if self.factors is None else self.factors[first:last]
        return replace(self, kept=self.kept[first:last], factors=factors)

    def tokens(self) -> Tensor:
        """(n,) indices of the tokens that are run."""
        if not self.cuts or self.factors is None or self.factors.dim() == 1:
            return self.texts.segments.tokens(self.kept)
        place = torch.arange(1, self.factors.shape[1] + 1, device=self.factors.device)
        ends = torch.zeros(len(self.texts), dtype=torch.long, device="cpu")
        ends[self.kept.cpu()] = torch.where(self.factors != 0, place, 1).amax(1).cpu()
        return self.texts.segments.tokens(self.kept, ends)

    def weights(self, device: torch.device) -> Tensor:
        """(B * T,) factor of each token, 0 where its text is dropped."""
        shape = (len(self.texts),) if self.factors is None else (len(self.texts), *self.factors.shape[1:])
        full = torch.zeros(shape, device=device, dtype=torch.float64 if device.type == "cpu" else torch.float32)
        full[self.kept.to(device)] = 1 if self.factors is None else self.factors.to(full)
        return self.texts.segments.by_token(full)


def whole_pack(call: Call, packed: Packed, grads: Sequence[Tensor | None]) -> Part:
    """All tokens of a call, with a gradient of zero at those of dropped texts."""
    segments, found = packed.texts.segments, list[Tensor | RankOne | None]()
    for i, grad in enumerate(grads):
        if grad is None or not _tokens_of(call, i, grad, segments):
            found.append(grad)
            continue
        weights = packed.weights(grad.device).view(segments.rows, segments.length)[:, : grad.shape[1]]
        found.append(grad * weights.to(grad.dtype).view(*weights.shape, *[1] * (grad.dim() - 2)))
    return Part(call, torch.arange(call.batch, device=call.outputs[0].device), found)


def _tokens_of(call: Call, i: int, grad: Tensor, segments: Segments) -> int:
    """How many positions a row of an output has: as many as tokens, or one less; 0 where it gets no gradient.

    Raises:
        PackError: where it gets one and has no tokens.
    """
    where, shape = call.rows[i], call.outputs[i].shape
    lengths = (segments.length, segments.length - 1) if segments.rows == 1 else (segments.length,)
    if where == Rows(0) and len(shape) > 1 and shape[1] in lengths:
        return shape[1]
    if bool(grad.any()):
        raise PackError(
            f"gated: {call.output_name(i)} has shape {tuple(shape)} where a call has {len(segments)} texts in rows of "
            f"({segments.rows}, {segments.length}): which token each of its entries belongs to is not known. Return it "
            "as (B, T, ...), or (1, T - 1, ...) for labels that are shifted."
        )
    return 0


def cut(part: Part, packed: Packed) -> Part:
    """The tokens of some texts of a call, as a pack of their own."""
    call, texts = part.call, packed.texts
    segments, tokens = texts.segments, packed.tokens()
    weights = packed.weights(call.outputs[0].device)
    inputs = [
        take_tokens(leaf.detach(), role, segments, tokens) for leaf, role in zip(call.inputs, texts.roles, strict=True)
    ]
    outputs: list[Tensor | None] = []
    grads: list[Tensor | RankOne | None] = []
    for i, grad in enumerate(part.grads):
        assert not isinstance(grad, RankOne)
        length = 0 if grad is None else _tokens_of(call, i, grad, segments)
        if grad is None or not length:
            outputs.append(None)
            grads.append(None)
            continue
        mine = tokens.to(grad.device)
        mine = mine if length == segments.length else mine[:-1]
        factors = weights.to(grad.device)[mine].to(grad.dtype)
        taken = grad.flatten(0, 1)[mine] * factors.view(-1, *[1] * (grad.dim() - 2))
        grads.append(taken.unsqueeze(0))
        picked = i in call.picked
        outputs.append(None if picked else call.outputs[i].flatten(0, 1)[mine].unsqueeze(0))
    layout = list(next(call.readings()))
    held = Held(layout, inputs, outputs, None)
    one = torch.zeros(1, dtype=torch.long, device=call.outputs[0].device)
    return replace(part, rows=one, grads=grads, held=held, packed=None, texts=len(packed), origin=[(part, packed)])


def among_others(part: Part) -> dict[int, Tensor]:
    """The tokens of a part's texts of each output, run without a graph in packs of the screens' sizes.

    Tokens of dropped texts stand in their places as copies of kept ones, so that nothing of the others is there.
    """
    found: dict[int, list[Tensor]] = {}
    for source, packed in part.origin:
        call, segments = source.call, packed.texts.segments
        index, tokens = segments.filled(packed.kept), packed.tokens()
        inputs = [
            stand_in(leaf.detach(), segments, index) if role == "tokens" and _name(path) not in _POSITIONS else leaf
            for path, leaf, role in zip(call.input_paths, call.inputs, packed.texts.roles, strict=True)
        ]
        for i, output in enumerate(call.run_without_graph(inputs)):
            if part.grads[i] is not None:
                length = _tokens_of(call, i, output, segments)
                mine = tokens if length == segments.length else tokens[:-1]
                found.setdefault(i, []).append(output.flatten(0, 1)[mine.to(output.device)].unsqueeze(0))
    shifted = {i: part.call.outputs[i].shape[1] < part.origin[0][1].texts.segments.length for i in found}
    joined = {i: _one_after_another(each, shifted[i]) for i, each in found.items()}
    return {i: output for i, output in joined.items() if output is not None}


def into_passes(parts: list[Part], limit: int | None = None, pieces: int | None = None) -> list[list[Part]]:
    """Packs of kept texts, those of several calls in one where they go together.

    Args:
        parts: that have their texts still to be cut.
        limit: most texts in a pass.
        pieces: how many passes, instead; some are empty where there are fewer texts.
    """
    groups: list[list[Part]] = []
    for part in parts:
        group = next((group for group in groups if pieces is not None or _go_together(group[0], part)), None)
        if group is None:
            groups.append([part])
        else:
            group.append(part)
    passes = []
    for group in groups:
        total = sum(len(part.packed) for part in group if part.packed is not None)
        n = pieces or (1 if limit is None else -(-total // limit))
        for piece in range(n):
            mine = _between(group, total * piece // n, total * (piece + 1) // n)
            passes.append([joined(mine)] if mine else [])
    return passes


def _between(group: list[Part], first: int, last: int) -> list[tuple[Part, Packed]]:
    found, start = [], 0
    for part in group:
        assert part.packed is not None
        low, high = max(first - start, 0), min(last - start, len(part.packed))
        start += len(part.packed)
        if low < high:
            found.append((part, part.packed.between(low, high)))
    return found


def _go_together(a: Part, b: Part) -> bool:
    assert a.packed is not None and b.packed is not None
    roles = a.packed.texts.roles
    return (
        same_structure(a.call, b.call)
        and roles == b.packed.texts.roles
        and same_constants(a.call.args, b.call.args)
        and all(
            role != "shared" or same_values(x, y)
            for role, x, y in zip(roles, a.call.inputs, b.call.inputs, strict=True)
        )
    )


def joined(parts: list[tuple[Part, Packed]]) -> Part:
    """One pack of the texts of several calls.

    Raises:
        PackError: if the calls are not alike, where ranks have to make the same passes.
    """
    cuts = [cut(part, packed) for part, packed in parts]
    if len(cuts) == 1:
        return cuts[0]
    if not all(_go_together(parts[0][0], part) for part, _ in parts):
        raise PackError(
            "gated: calls of one window differ in what their packs share (a max_length, a flag), so their kept texts "
            "cannot be one pack, and on this engine every rank has to make the same passes: make them alike, or "
            "window=1"
        )
    texts = [packed.texts for _, packed in parts]
    held = [part.held for part in cuts if part.held is not None]
    inputs = [
        put_together([h.inputs[i] for h in held], role, [t.segments for t in texts], [p.call.inputs[i] for p in cuts])
        for i, role in enumerate(texts[0].roles)
    ]
    grads: list[Tensor | RankOne | None] = []
    outputs: list[Tensor | None] = []
    for i in range(len(cuts[0].grads)):
        shifted = cuts[0].call.outputs[i].dim() > 1 and cuts[0].call.outputs[i].shape[1] < texts[0].segments.length
        grads.append(_one_after_another([part.grads[i] for part in cuts], shifted))  # type: ignore[misc]
        outputs.append(_one_after_another([h.outputs[i] for h in held], shifted))
    measures = [_largest([part.measure(i) for part in cuts], output) for i, output in enumerate(outputs)]
    whole = Held(held[0].layout, inputs, outputs, measures)
    return replace(cuts[0], grads=grads, held=whole, texts=sum(part.texts or 0 for part in cuts), origin=parts)


def _one_after_another(tensors: Sequence[Tensor | None], shifted: bool) -> Tensor | None:
    """Tensors (1, n, ...) along their tokens; where labels are shifted nothing comes of the last token of each."""
    found: list[Tensor] = []
    for tensor in tensors:
        if tensor is not None:
            if found and shifted:
                found.append(tensor.new_zeros(1, 1, *tensor.shape[2:]))
            found.append(tensor)
    return torch.cat(found, 1) if found else None


def _largest(measures: Sequence[Tensor | None], output: Tensor | None) -> Tensor | None:
    every = [measure for measure in measures if measure is not None]
    if output is None or len(every) < len(measures):
        return None
    if output.dim() == 2:
        return torch.stack([measure.amax() for measure in every]).amax().expand(output.shape[1])
    return torch.stack(every).amax(0)
