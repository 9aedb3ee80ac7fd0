"""Delight of the calls that a backward has reached, and what is said of it."""

from dataclasses import replace

import torch
from torch import Tensor

from kondo_hooks.core.arrival import Arrival, find_scales, find_signal
from kondo_hooks.core.looks import Looks
from kondo_hooks.core.norms import find_norms
from kondo_hooks.core.shared import Shared
from kondo_hooks.core.verify import name_of
from kondo_hooks.delight.graph import Path
from kondo_hooks.errors import DelightError, PackError
from kondo_hooks.rows.axes import Rows
from kondo_hooks.rules.readback import Readback
from kondo_hooks.rules.samples import Signal

_RESIDUAL = 0.1
_BLOCK = 3  # tokens of a text, at least and on average
_FEW = 32  # calls, whose norms are worth knowing where the rule does not need them


class Reader:
    """Reads delight.

    Attributes:
        copy_outputs: whether the user's code has been seen to write into outputs.
    """

    def __init__(self, shared: Shared, looks: Looks):
        self.shared = shared
        self._looks = looks
        self.copy_outputs = False
        self._looked_for_packs = False

    def read(self, arrivals: list[Arrival], back: Readback) -> None:
        """Find each call's signal; some of what may be wrong is told when ``back`` is read."""
        for a in arrivals:
            if a.unsplit():
                self._looks.forget_constants(a)
            a.check(back)
            if a.call.overwritten(a.grads):
                self.copy_outputs = True
                with self.shared.looking():
                    a.call.screen_again()
        config = self.shared.selector.config
        for a in arrivals:
            a.texts = a.call.texts
            if a.texts is not None:
                self._check_padding(a)
        tokens = config.tokens or any(a.texts is not None for a in arrivals)
        read: list[Arrival] = []
        unread: list[tuple[Arrival, DelightError]] = []
        paths: list[list[list[Path]]] = []
        for a in arrivals:
            a.forced = a.overflowed()
            try:
                a.signal, a.offset, taken = find_signal(a, tokens, self._looks.probe_outputs, self._warn_residual)
                a.call.policy = a.policy()
                read.append(a)
                paths.append(taken)
            except DelightError as error:
                unread.append((a, error))
            self._warn_critic(a)
        for a, scale in zip(read, find_scales(paths, [a.samples for a in read], self.shared.warn), strict=True):
            assert a.signal is not None
            u = a.signal.advantages
            a.signal = replace(a.signal, advantages=u / (scale.to(u.device) if isinstance(scale, Tensor) else scale))
            a.scale = scale
            self._tell_packed(a)
        for a in arrivals:
            for observation in a.call.observations:
                observation.release()
            if tokens and a.signal is not None:
                self._looks.find_positions(a)
                self._take_in_others(a)
        for a, cause in unread:
            a.follow(b for b in arrivals if b.signal is not None)
            if a.follows is None:
                if config.needs_delight:
                    raise cause
                if config.tokens:
                    raise DelightError(
                        f"gated: unit={config.unit!r} chooses among the positions of log-probs, and no policy was "
                        "found in the loss or in the model's outputs. Mark the log-prob of each token with "
                        "gate.logp(...), or leave unit='sample', where this rule needs none."
                    ) from cause
                shape = (a.call.batch, 1) if a.texts is None else (a.texts.segments.rows, a.texts.segments.length)
                rows = torch.zeros(shape, device=a.call.outputs[0].device)
                a.signal, a.offset = Signal(rows, rows, rows == 0, is_known=False), 0
                if a.texts is not None:
                    used = [i for i, grad in enumerate(a.grads) if grad is not None and a.call.rows[i] is not None]
                    a.source = next(iter(used), None)
                    a.positions = {i: a.call.outputs[i].shape[1:2] == shape[1:] for i in used}
        if config.weighs or config.asks or config.needs_norm or len(arrivals) <= _FEW:
            find_norms(arrivals, tokens, config.weighs, config.is_lossless, self._tell_without_positions)
        for a in arrivals:
            if a.signal is not None and tokens:
                a.signal = _as_samples(a.signal, a, config.tokens)

    def _tell_packed(self, a: Arrival) -> None:
        """Warn of the first lone row of a window whose advantages stand in blocks, as those of several texts do.

        Without a window a lone row is told in any case.
        """
        assert a.signal is not None
        lone = a.call.batch == 1 and a.texts is None and self.shared.segments is not False and self.shared.waits
        if not lone or self._looked_for_packs or a.signal.valid.shape[1] < _BLOCK:
            return
        self._looked_for_packs = True
        u = a.signal.advantages[a.signal.valid]
        blocks = 1 + int((u[1:] != u[:-1]).sum()) if len(u) else 0
        if 2 <= blocks <= len(u) // _BLOCK:
            self.shared.warn(
                "packed",
                f"gated: the only row of a call has {blocks} advantages, each for some tokens after another, as if it "
                "held as many texts. It counts as one sample, which is kept or dropped whole. Give the model what "
                "tells texts apart (position_ids, cu_seqlens, ...), or name it with segments=; segments=False says "
                "that it is one text.",
            )

    def _take_in_others(self, a: Arrival) -> None:
        """Take in positions before and after the policy's, where another term has a gradient there: all count."""
        assert a.signal is not None
        where = None if a.source is None else a.call.rows[a.source]
        if a.source is None or where is None:
            return
        shape = where.first(a.call.outputs[a.source]).shape
        first, last = a.offset, a.offset + a.signal.valid.shape[1]
        one = a.signal.valid.shape[1] == 1 and a.texts is None
        if len(shape) < 2 or one or last > shape[1] or (first, last) == (0, shape[1]):
            return
        if a.texts is None and not self._has_others(a, shape[1]):
            return
        full = [t.new_zeros(len(t), shape[1]) for t in (a.signal.advantages, a.signal.surprisal, a.signal.valid)]
        for whole, part in zip(full, (a.signal.advantages, a.signal.surprisal, a.signal.valid), strict=True):
            whole[:, first:last] = part
        a.signal, a.offset = Signal(full[0], full[1], full[2]), 0

    def _check_padding(self, a: Arrival) -> None:
        """Refuse a gradient at tokens that are no text's: nothing would say if they are kept."""
        assert a.texts is not None
        segments = a.texts.segments
        padding = (segments.ids < 0).view(segments.rows, segments.length)
        if not bool(padding.any()):
            return
        for i, (grad, where) in enumerate(zip(a.grads, a.call.rows, strict=True)):
            if grad is None or where != Rows(0) or grad.dim() < 2 or grad.shape[1] > segments.length:
                continue
            if bool(grad[padding[:, : grad.shape[1]].to(grad.device)].any()):
                raise PackError(
                    f"gated: {name_of(a.call, i)} gets a gradient at tokens that belong to no text (padding): mask "
                    "them in the loss, or say segments=False if rows are the samples"
                )

    def _has_others(self, a: Arrival, length: int) -> bool:
        assert a.signal is not None
        first, last = a.offset, a.offset + a.signal.valid.shape[1]
        for i, (grad, where) in enumerate(zip(a.grads, a.call.rows, strict=True)):
            if grad is None or where is None or not (i == a.source or a.positions.get(i)):
                continue
            rows = where.first(grad)
            if bool(rows[:, :first].any()) or bool(rows[:, last:length].any()):
                if not self.shared.selector.config.weighs:
                    self.shared.warn(
                        "other positions",
                        f"gated: unit={self.shared.selector.config.unit!r}: {name_of(a.call, i)} gets a gradient at "
                        "positions where no action is (a value of the prompt, an entropy?). They have no delight, so "
                        "this rule drops them; noise=, rate='lossless' and other rules that weigh keep their share.",
                    )
                return True
        return False

    def _tell_without_positions(self, arrival: Arrival, i: int) -> None:
        config = self.shared.selector.config
        if config.weighs and config.is_fair and (grad := arrival.grads[i]) is not None and bool(grad.any()):
            self.shared.warn(
                "without positions",
                f"gated: unit='token': {name_of(arrival.call, i)} gets a gradient and has no positions. A row's part "
                "in it counts by the largest factor of its tokens, which is not right on average under this rule. "
                "Leave unit='sample', or use rate='lossless', which keeps all of it.",
            )

    def _warn_critic(self, arrival: Arrival) -> None:
        """Say once where a rule that prefers some rows decides what something else than the policy learns from."""
        config = self.shared.selector.config
        if config.is_fair or not self.shared.warn.is_new("critic"):
            return
        for i in arrival.others():
            self.shared.warn(
                "critic",
                f"gated: {name_of(arrival.call, i)} gets a gradient but holds no policy (a critic, an entropy bonus?). "
                "It learns from the chosen rows alone, which are no fair sample: a critic learns the value of lucky "
                "rows. Train it on all rows (a model of its own outside of the gate), or use a rule without bias: "
                "noise=0.5, rate='auto' or rate='lossless' (docs/rules.md).",
            )
            return

    def _warn_residual(self, residual: float) -> None:
        if residual > _RESIDUAL and self.shared.selector.config.needs_delight:
            self.shared.warn(
                "residual",
                f"gated: the loss is far from a policy gradient: {residual:.0%} of its gradient at the model's output "
                "is something else (an entropy bonus, a KL term, a regression?). Delight was read off all of it; "
                "mark the log-prob with gate.logp(...) to read it off the policy term alone.",
            )

    def warn_single(self, arrivals: list[Arrival]) -> None:
        """The first population is one row: a gate that keeps a share of the rows always keeps it."""
        config = self.shared.selector.config
        always = config.price is None and not config.history and config.hard and config.deterministic
        always = always and not config.weighs
        if not always or config.tokens or self.shared.engine.together or arrivals[0].texts is not None:
            return
        self.shared.warn(
            "single",
            f"gated: a backward here is one row, {arrivals[0].call.described()}, and of one row the gate always keeps "
            "it: nothing is saved. If texts are packed into that row, (1, total), say what tells them apart "
            "(segments=), or pad each to a row of its own, (B, T). If a step is several backwards, window=N chooses "
            "among their rows.",
        )


def _as_samples(signal: Signal, arrival: Arrival, tokens: bool) -> Signal:
    """What was read of positions, for texts, or where samples are rows, of these."""
    norm = signal.norm
    if arrival.texts is None:
        if not tokens and norm is not None and norm.dim() > 1:
            norm = torch.linalg.vector_norm(norm, 2, 1)
        return replace(signal, norm=norm)
    segments, offset = arrival.texts.segments, arrival.offset
    advantages, surprisal, valid = (
        segments.by_text(t, offset) for t in (signal.advantages, signal.surprisal, signal.valid)
    )
    if norm is not None:
        norm = segments.by_text(norm, offset)
        norm = norm if tokens else torch.linalg.vector_norm(norm, 2, 1)
    return Signal(advantages, surprisal, valid, norm=norm, is_known=signal.is_known)
