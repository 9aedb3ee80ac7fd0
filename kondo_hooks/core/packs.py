"""Rows that hold many texts, cut to the kept ones and put together: a replay is a shorter pack."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kondo_hooks.core.call import Call
from kondo_hooks.core.compact import RankOne
from kondo_hooks.core.kept_rows import Gradient, Held, Part, overlaps, same_constants, same_structure, same_values
from kondo_hooks.core.texts import Texts
from kondo_hooks.errors import PackError, predicts_padding
from kondo_hooks.rows.axes import Rows
from kondo_hooks.rows.segments import Segments, put_together, put_tokens, stand_in, take_tokens, token_axis


@dataclass(frozen=True)
class Packed:
    """Texts of one call that are to be replayed.

    Attributes:
        texts: all of them.
        kept: (n,) which, ascending.
        factors: (n,) on their gradients, or (n, L) on their tokens'; None where all are one.
        cuts: whether each goes no further than to its last token with a factor.
        more: tokens that are run beyond that one: labels that the model shifts.
        followed: (S,) the texts after which the first token of the next runs along, as a text of its own, for the
            loss uses what their last token predicts. None where there are none.
    """

    texts: Texts
    kept: Tensor
    factors: Tensor | None
    cuts: bool = False
    more: int = 0
    followed: Tensor | None = None

    def __len__(self) -> int:
        return len(self.kept)

    def between(self, first: int, last: int) -> "Packed":
        """Some of its texts, by position."""
        factors = None if self.factors is None else self.factors[first:last]
        return replace(self, kept=self.kept[first:last], factors=factors)

    def tokens(self) -> Tensor:
        """(n,) indices of the tokens that are run."""
        segments, kept = self.texts.segments, self.kept.cpu()
        lengths = torch.zeros_like(segments.lengths)
        lengths[kept] = segments.lengths[kept]
        if self.cuts and self.factors is not None and self.factors.dim() > 1:
            place = torch.arange(1, self.factors.shape[1] + 1, device=self.factors.device)
            ends = torch.where(self.factors != 0, place, 1).amax(1).cpu() + self.more
            lengths[kept] = torch.minimum(lengths[kept], ends)
        if self.followed is not None:
            ended = self.followed & (lengths == segments.lengths)
            lengths[1:] = torch.maximum(lengths[1:], ended[:-1].long())
        return segments.tokens(lengths)

    def weights(self, device: torch.device) -> Tensor:
        """(B * T,) factor of each token, 0 where its text is dropped."""
        shape = (len(self.texts),) if self.factors is None else (len(self.texts), *self.factors.shape[1:])
        full = torch.zeros(shape, device=device, dtype=torch.float64 if device.type == "cpu" else torch.float32)
        full[self.kept.to(device)] = 1 if self.factors is None else self.factors.to(full)
        return self.texts.segments.by_token(full)


def whole_pack(call: Call, packed: Packed, grads: Sequence[Gradient | None]) -> Part:
    """All tokens of a call, with a gradient of zero at those of dropped texts."""
    segments, found = packed.texts.segments, list[Gradient | None]()
    for i, grad in enumerate(grads):
        if grad is None or not _tokens_of(call, i, grad, segments):
            found.append(grad)
            continue
        weights = packed.weights(_device(grad)).view(segments.rows, segments.length)[:, : grad.shape[1]]
        if isinstance(grad, RankOne):
            found.append(grad.weighted(weights))
            continue
        found.append(grad * weights.to(grad.dtype).view(*weights.shape, *[1] * (grad.dim() - 2)))
    return Part(call, torch.arange(call.batch, device=call.outputs[0].device), found, counted=len(segments))


def _device(grad: Gradient) -> torch.device:
    return grad.coefficient.device if isinstance(grad, RankOne) else grad.device


def _tokens_of(call: Call, i: int, grad: Gradient, segments: Segments) -> int:
    """How many positions a row of an output has: as many as tokens, or one less; 0 where it gets no gradient.

    Raises:
        PackError: where it gets one and has no tokens.
    """
    where, shape = call.rows[i], call.outputs[i].shape
    lengths = (segments.length, segments.length - 1) if segments.rows == 1 else (segments.length,)
    if where == Rows(0) and len(shape) > 1 and shape[1] in lengths:
        return shape[1]
    if isinstance(grad, RankOne) or bool(grad.any()):
        raise PackError(
            f"gated: {call.output_name(i)} has shape {tuple(shape)} where a call has {len(segments)} texts in rows of "
            f"({segments.rows}, {segments.length}): which token each of its entries belongs to is not known. Return it "
            "as (B, T, ...), or (1, T - 1, ...) for labels that are shifted."
        )
    return 0


def is_shifted(call: Call, i: int, segments: Segments) -> bool:
    """Whether an output is one short of the tokens: the model shifts labels."""
    return call.outputs[i].dim() > 1 and call.outputs[i].shape[1] == segments.length - 1


def cut(part: Part, packed: Packed) -> Part:
    """The tokens of some texts of a call, as a pack of their own."""
    packed = _followed(part, packed)
    call, texts = part.call, packed.texts
    segments, tokens = texts.segments, packed.tokens()
    weights = packed.weights(call.outputs[0].device)
    inputs = [
        take_tokens(leaf.detach(), role, segments, tokens) for leaf, role in zip(call.inputs, texts.roles, strict=True)
    ]
    outputs: list[Tensor | None] = []
    grads: list[Gradient | None] = []
    for i, grad in enumerate(part.grads):
        if grad is None or not _tokens_of(call, i, grad, segments):
            outputs.append(None)
            grads.append(None)
            continue
        mine = tokens.to(_device(grad))
        mine = mine[:-1] if is_shifted(call, i, segments) else mine
        factors = weights.to(mine.device)[mine]
        if isinstance(grad, RankOne):
            outputs.append(None)
            grads.append(grad.tokens(mine, factors))
            continue
        factors = factors.to(grad.dtype)
        taken = grad.flatten(0, 1)[mine] * factors.view(-1, *[1] * (grad.dim() - 2))
        grads.append(taken.unsqueeze(0))
        outputs.append(call.outputs[i].flatten(0, 1)[mine].unsqueeze(0))
    layout = [None if role == "shared" else Rows(0) for role in texts.roles]
    held = Held(layout, inputs, outputs, None)
    one = torch.zeros(1, dtype=torch.long, device=call.outputs[0].device)
    return replace(part, rows=one, grads=grads, held=held, packed=None, texts=len(packed), origin=[(part, packed)])


def apart(part: Part) -> list[Part]:
    """Each of a part's texts by itself, as another rank can be given it."""
    assert part.packed is not None
    return [cut(part, part.packed.between(i, i + 1)) for i in range(len(part.packed))]


def _followed(part: Part, packed: Packed) -> Packed:
    """With what tells where the loss uses the prediction of a text's last token, where a model shifts its labels.

    A loss that is masked by the labels (-100) sends a gradient there, too, which the model then ignores.

    Raises:
        PackError: if it is padding that is predicted.
    """
    segments, used = packed.texts.segments, None
    for i, grad in enumerate(part.grads):
        if grad is None or not _tokens_of(part.call, i, grad, segments) or not is_shifted(part.call, i, segments):
            continue
        sent = grad.coefficient if isinstance(grad, RankOne) else grad
        last = segments.last.to(sent.device)
        inside = last < sent.shape[1]
        last = last.clamp_max(sent.shape[1] - 1)
        factors = packed.weights(sent.device)[last] * inside
        used_of = sent[0].index_select(0, last).reshape(len(last), -1).ne(0).any(1)
        mine = (used_of & (factors != 0)).cpu()
        if bool((mine & (segments.next < 0)).any()):
            raise predicts_padding(part.call.output_name(i))
        used = mine if used is None else used | mine
    return packed if used is None or not bool(used.any()) else replace(packed, followed=used)


def among_others(part: Part) -> dict[int, Tensor]:
    """The tokens of a part's texts of each output, run without a graph in packs of the screens' sizes.

    Tokens of dropped texts stand in their places as copies of kept ones, so that nothing of the others is there.
    """
    found: dict[int, list[Tensor]] = {}
    for source, packed in part.origin:
        call, segments = source.call, packed.texts.segments
        index, tokens = segments.filled(packed.tokens()), packed.tokens()
        inputs = [
            stand_in(leaf.detach(), segments, index) if role == "tokens" else leaf
            for leaf, role in zip(call.inputs, packed.texts.roles, strict=True)
        ]
        for i, output in enumerate(call.run_without_graph(inputs)):
            if part.grads[i] is not None:
                mine = tokens[:-1] if is_shifted(call, i, segments) else tokens
                found.setdefault(i, []).append(output.flatten(0, 1)[mine.to(output.device)].unsqueeze(0))
    segments = part.origin[0][1].texts.segments
    whole = {i: _one_after_another(each, is_shifted(part.call, i, segments)) for i, each in found.items()}
    return {i: output for i, output in whole.items() if output is not None}


def into_passes(parts: list[Part], limit: int | None = None, pieces: int | None = None) -> list[list[Part]]:
    """Packs of kept texts, those of several calls in one where they go together.

    Args:
        parts: that have their texts still to be cut, or single texts of another rank.
        limit: most texts in a pass.
        pieces: how many passes, instead; some are empty where there are fewer texts.
    """
    groups: list[list[Part]] = []
    for part in parts:
        group = next((group for group in groups if pieces is not None or _longest(group[0], part) is not None), None)
        if group is None:
            groups.append([part])
        else:
            group.append(part)
    passes = []
    for group in groups:
        total = sum(map(texts_in, group))
        n = pieces or (1 if limit is None else -(-total // limit))
        for piece in range(n):
            mine = _overlapping(group, total * piece // n, total * (piece + 1) // n)
            passes.append([joined(mine)] if mine else [])
    return passes


def texts_in(part: Part) -> int:
    """How many texts a part of packed rows has; of other parts how many rows."""
    return len(part) if part.packed is None else len(part.packed)


def _overlapping(group: list[Part], first: int, last: int) -> list[Part]:
    return [group[n].between(low, high) for n, low, high in overlaps(map(texts_in, group), first, last)]


def _longest(a: Part, b: Part) -> list[tuple[int, int]] | None:
    """What the calls of two parts say of their longest texts; None where their texts cannot be one pack."""
    longest: list[tuple[int, int]] = []
    roles = a.call.texts.roles
    alike = (
        same_structure(a.call, b.call)
        and roles == b.call.texts.roles
        and same_constants(a.call.args, b.call.args, longest)
        and all(
            role != "shared" or same_values(x, y)
            for role, x, y in zip(roles, a.call.inputs, b.call.inputs, strict=True)
        )
    )
    return longest if alike else None


def joined(parts: list[Part]) -> Part:
    """One pack of the texts of several calls, run as the call that says the longest of its texts would run them.

    Raises:
        PackError: if the calls are not alike, where ranks have to make the same passes.
    """
    cuts = [part if part.packed is None else cut(part, part.packed) for part in parts]
    if len(cuts) == 1:
        return cuts[0]
    longest = [_longest(cuts[0], part) for part in cuts]
    told = [] if None in longest else [[theirs for _, theirs in each or ()] for each in longest]
    most = [max(each) for each in zip(*told, strict=True)]
    runs = next((part.call for part, mine in zip(cuts, told, strict=False) if mine == most), None)
    if runs is None:
        raise PackError(
            "gated: calls of one window differ in what their packs share (a flag, a mask), so their kept texts cannot "
            "be one pack, and on this engine every rank has to make the same passes: make them alike, or window=1"
        )
    texts = [part.call.texts for part in cuts]
    held = [part.held for part in cuts if part.held is not None]
    inputs = [
        put_together([h.inputs[i] for h in held], role, [t.segments for t in texts], [p.call.inputs[i] for p in cuts])
        for i, role in enumerate(texts[0].roles)
    ]
    grads: list[Gradient | None] = []
    outputs: list[Tensor | None] = []
    for i in range(len(cuts[0].grads)):
        shifted = is_shifted(cuts[0].call, i, texts[0].segments)
        screened = [h.outputs[i] for h in held]
        grad = _gradients_after_another([part.grads[i] for part in cuts], screened, shifted)
        grads.append(grad)
        outputs.append(None if isinstance(grad, RankOne) else _one_after_another(screened, shifted))
    measures = [_largest([part.measure(i) for part in cuts], output) for i, output in enumerate(outputs)]
    whole = Held(held[0].layout, inputs, outputs, measures)
    origin = [each for part in cuts for each in part.origin] if all(part.origin for part in cuts) else []
    number = sum(part.texts or 0 for part in cuts)
    return replace(cuts[0], call=runs, grads=grads, held=whole, texts=number, origin=origin)


def _gradients_after_another(
    grads: Sequence[Gradient | None], screened: Sequence[Tensor | None], shifted: bool
) -> Gradient | None:
    """Gradients (1, n, ...) along their tokens; in their form if one of them has it, with what has none beside it."""
    dense = [grad for grad in grads if not isinstance(grad, RankOne)]
    if len(dense) == len(grads):
        return _one_after_another(dense, shifted)
    forms, rests = list[RankOne](), list[Tensor | None]()
    for grad, logits in zip(grads, screened, strict=True):
        if isinstance(grad, RankOne):
            forms.append(grad)
            rests.append(grad.coefficient.new_zeros(1, dtype=grad.dtype).expand(grad.shape) if dense else None)
        elif grad is not None:
            assert logits is not None
            forms.append(RankOne.beside(logits, grad))
            rests.append(grad)
    each = [_one_after_another(tensors, shifted) for tensors in zip(*(form.tensors() for form in forms), strict=True)]
    coefficient, action, logp = (t for t in each if t is not None)
    shape = torch.Size((1, coefficient.shape[1], forms[0].shape[-1]))
    return RankOne(coefficient, action, logp, shape, forms[0].dtype, _one_after_another(rests, shifted))


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


def input_grad(like: Tensor, part: Part, grad: Tensor) -> Tensor:
    """The gradient of an input in full size, zero at tokens that were not run; of one that texts share, as it is."""
    _, packed = part.origin[0]
    segments = packed.texts.segments
    if token_axis(like.shape, segments) is None:
        return grad
    return put_tokens(torch.zeros_like(like), segments, packed.tokens(), grad)
