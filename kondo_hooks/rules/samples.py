"""What is known of each sample, and what was decided on them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kondo_hooks.rules.config import Reduction, additive
from kondo_hooks.rules.readback import Readback, to_device


@dataclass
class Signal:
    """What is known of each sample: advantage, surprisal, and where they mean something.

    All three have the same shape, (B,) or (B, T). ``valid`` is False on padding and masked positions.

    Attributes:
        norm: norm of each sample's gradient at the model's outputs, (B,), or (B, T) where samples are positions.
        draws: the samples' random scores, where these were drawn already.
        factors: the factors on the samples' gradients, where these were decided on already; 0 where dropped.
        is_known: whether there is a policy, so that advantage and surprisal are more than zeros in their place.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> signal = kondo.Signal.of(torch.tensor([-0.5, -2.0]), advantages=torch.tensor([1.0, 1.0]))
        >>> signal.delight
        tensor([0.5000, 2.0000])
    """

    advantages: Tensor
    surprisal: Tensor
    valid: Tensor
    norm: Tensor | None = None
    draws: Tensor | None = None
    factors: Tensor | None = None
    is_known: bool = True

    @classmethod
    def of(cls, logp: Tensor, advantages: Tensor, mask: Tensor | None = None) -> "Signal":
        """Check and align log-probs (B,) or (B, T), advantages (B,) or (B, T), mask (B,) or (B, T)."""
        if not isinstance(logp, Tensor) or logp.dim() not in (1, 2):
            raise ValueError(f"logp must be a tensor of shape (B,) or (B, T), got {_shape(logp)}")
        logp = logp.detach()
        advantages = _like("advantages", advantages, logp)
        valid = torch.ones_like(logp, dtype=torch.bool) if mask is None else _like("mask", mask, logp) != 0
        return cls(advantages, -logp, valid)

    def norm_at_logits(self, tokens: bool) -> Tensor:
        """What is known of the gradient's norm from log-probs: ``|U| (1 - pi)`` of a position, (B, T) or over a row."""
        size = self._where_valid(self.advantages * -torch.expm1(-self.surprisal)).abs()
        return size if tokens or size.dim() == 1 else torch.linalg.vector_norm(size, 2, 1)

    @property
    def delight(self) -> Tensor:
        """Advantage times surprisal, zero where not valid; same shape as the fields."""
        return self._where_valid(self.advantages * self.surprisal)

    def _where_valid(self, score: Tensor) -> Tensor:
        return torch.where(self.valid, score, torch.zeros((), dtype=score.dtype, device="cpu"))

    def score(self, priority: str | additive) -> Tensor:
        """What ``priority`` ranks by, at each position; zero where not valid."""
        if priority == "delight":
            return self.delight
        if priority == "additive":
            priority = additive()
        if isinstance(priority, additive):
            score = priority.alpha * self.advantages + (1 - priority.alpha) * self.surprisal
        elif priority == "surprisal":
            score = self.surprisal
        else:
            score = self.advantages if priority == "advantage" else self.advantages.abs()
        return self._where_valid(score)

    def reduce(self, score: Tensor, reduction: Reduction) -> Tensor:
        """Reduce a (B, T) score over its valid positions to (B,); a row without any gets 0."""
        if score.dim() == 1:
            return score
        if score.shape[1] == 1:
            return score[:, 0]
        if reduction == "max":
            top = score.masked_fill(~self.valid, -torch.inf).amax(1)
            return torch.where(self.valid.any(1), top, 0)
        total = score.sum(1)
        return total / self.valid.sum(1).clamp(min=1) if reduction == "mean" else total


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _like(name: str, value: Any, logp: Tensor) -> Tensor:
    """``value`` in logp's shape: the same, or one value a row spread over the row's positions."""
    value = torch.as_tensor(value, device=logp.device).detach()
    if value.shape == logp.shape:
        return value
    rows = logp.shape[0]
    if logp.dim() == 2 and value.shape in ((rows,), (rows, 1)):
        return value.reshape(rows, 1).expand_as(logp)
    raise ValueError(
        f"{name} has shape {tuple(value.shape)}, logp has {tuple(logp.shape)}: give {name} the shape of logp"
        + (f", or one value a row, ({rows},)" if logp.dim() == 2 else "")
    )


@dataclass
class Rows:
    """What a rule is given: the N samples of a population, on the host, so that to look at them stalls nobody.

    The samples are rows, in the order of the calls, or with ``unit="token"`` the valid positions, each with P = 1. With
    ``scope="global"`` they are those of all ranks, with P = 1: a row's mean advantage and total surprisal.

    Attributes:
        advantages: (N, P) the advantage of each position.
        surprisal: (N, P) ``-log pi(a)`` of each position.
        valid: (N, P) False on padding and masked positions.
        delight: (N,) advantage x nats.
        norm: (N,) norm of the gradient at the model's outputs. If several outputs have one, each counts by its share.
        groups: (N,) the prompt that each is an answer to, if ``groups`` tells.
        step: the number of the decision.
        generator: the generator to draw from, alike on all ranks that decide together.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
        >>> def loss(logits):
        ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
        >>> def largest_half(rows: kondo.Rows):
        ...     return (rows.norm >= rows.norm.median()).float()
        >>> with kondo.gated(model, rule=largest_half) as gate:
        ...     loss(model(obs)).backward()
        >>> gate.stats.kept
        11
    """

    advantages: Tensor
    surprisal: Tensor
    valid: Tensor
    delight: Tensor
    norm: Tensor
    groups: Tensor | None
    step: int
    generator: torch.Generator

    def __len__(self) -> int:
        return len(self.delight)

    @property
    def advantage(self) -> Tensor:
        """(N,) mean advantage of the valid positions; 0 where there is none."""
        return mean_valid(self.advantages, self.valid)


def mean_valid(values: Tensor, valid: Tensor) -> Tensor:
    """(N,) mean of (N,) or (N, P) values where they are valid; 0 where none is."""
    values = torch.where(valid, values, torch.zeros((), dtype=values.dtype, device="cpu"))
    if values.dim() == 1:
        return values
    return values[:, 0] if values.shape[1] == 1 else values.sum(1) / valid.sum(1).clamp(min=1)


@dataclass
class Decision:
    """What the gate decided for one population of N samples (rows, or tokens when ``unit="token"``).

    Attributes:
        delight: (N,) advantage x nats; NaN where a rule that needs none found no policy.
        kept: (K,) indices into the population, ascending.
        weights: (K,) factors on the kept samples' gradients, or None for all ones.
        price: the score that a sample had to beat.
        rate: K / N.
        scale: the loss's own scale ``s`` that was divided out of the delight (1/N for a mean).
        samples: how many were chosen from: N, less the invalid tokens.
        sum_delight: total delight of all samples.
        sum_delight_kept: total delight of the kept ones.
        norm: (N,) norm of each sample's gradient at the model's outputs, with the loss's scale. None where it is not
            known: for an episode of many calls only rules that need it have it.
        noise: what a draw adds to the second moment, ``sum n^2 / p`` over ``sum n^2``, less one; NaN if none was made.
        without_gradient: fraction of the samples that have none; NaN where the rule did not ask.
        largest_factor: the largest factor on a kept sample's gradient; NaN where the rule gives none.
        cost: seconds times noise of a draw that went by both, a sample and in units of ``sum n^2``; else NaN.
        signals: what is known of the samples, as it was read.
        steps_of: (R,) the sample of each row that the model was called on, where several are steps of one sequence.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
        >>> def loss(logits):
        ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
        >>> with kondo.gated(model, rate=0.1) as gate:
        ...     loss(model(obs)).backward()
        >>> gate.last.delight.shape, gate.last.kept.tolist() == gate.last.delight.topk(2).indices.sort().values.tolist()
        (torch.Size([20]), True)
        >>> int((gate.last.factors() > 0).sum())
        2
    """

    delight: Tensor
    kept: Tensor
    weights: Tensor | None
    price: float
    rate: float
    scale: float = 1.0
    samples: int = -1
    sum_delight: float = math.nan
    sum_delight_kept: float = math.nan
    norm: Tensor | None = None
    noise: float = math.nan
    without_gradient: float = math.nan
    largest_factor: float = math.nan
    cost: float = math.nan
    signals: Sequence[Signal] = ()
    steps_of: Tensor | None = None

    def __post_init__(self) -> None:
        if self.samples < 0:
            self.samples = len(self.delight)

    def factors(self) -> Tensor:
        """(N,) factor on each sample's gradient, 0 where it was dropped.

        Where samples are sequences whose steps are the rows that the model is called on: of each of these rows.
        """
        factors = self.delight.new_zeros(len(self.delight))
        factors[self.kept] = 1 if self.weights is None else self.weights.to(factors.dtype)
        return factors if self.steps_of is None else factors[self.steps_of.to(factors.device)]

    @property
    def advantage(self) -> Tensor:
        """(N,) of each row its mean, or of each token its own; empty where they are not known."""
        return self._each(lambda s: mean_valid(s.advantages, s.valid), lambda s: s.advantages)

    @property
    def surprisal(self) -> Tensor:
        """(N,) of each row its sum, in nats, or of each token its own; empty where they are not known."""
        return self._each(lambda s: s.reduce(torch.where(s.valid, s.surprisal, 0), "sum"), lambda s: s.surprisal)

    def _each(self, rows: Callable[[Signal], Tensor], tokens: Callable[[Signal], Tensor]) -> Tensor:
        if sum(len(s.valid) for s in self.signals) == len(self.delight):
            return torch.cat([rows(s) for s in self.signals] or [self.delight.new_empty(0)])
        return torch.cat([tokens(s).reshape(-1) for s in self.signals] or [self.delight.new_empty(0)])

    def cut(self, parts: Sequence[Tensor]) -> None:
        """Keep no more than the factors of each call say, (B,) or (B, P)."""
        factors = torch.cat([part.reshape(-1).to(self.delight.device) for part in parts])
        self.kept = factors.nonzero().flatten()
        self.weights = None if self.weights is None else factors[self.kept]
        self.rate = len(self.kept) / max(self.samples, 1)

    def explain(self, signals: Sequence[Signal]) -> None:
        """Note what was known of the samples."""
        self.signals = signals
        if not all(signal.is_known for signal in signals):
            self.delight = torch.full_like(self.delight, math.nan)
            self.sum_delight = self.sum_delight_kept = math.nan

    def count(self, back: Readback) -> None:
        """Have the sums of delight read."""

        def note(sums: list[float]) -> None:
            self.sum_delight, self.sum_delight_kept = sums

        back.ask([self.delight.sum(), self.delight[self.kept].sum()], note)


@dataclass
class Kept:
    """What is kept of one batch.

    Attributes:
        rows: (n,) indices of its rows, ascending.
        factors: (n,) or (n, P) factors on their gradients; None where all are one.
    """

    rows: Tensor
    factors: Tensor | None

    @classmethod
    def of(cls, factors: Tensor) -> "Kept":
        """Of (B,) or (B, P) factors, 0 where dropped."""
        rows = any_of_row(factors).nonzero().flatten()
        mine = factors[rows]
        return cls(rows, None if mine.device.type == "cpu" and bool((mine == 1).all()) else mine)

    def spread(self, batch: int, dtype: torch.dtype) -> Tensor:
        """(batch,) or (batch, P) factors, 0 where dropped."""
        shape = (batch,) if self.factors is None else (batch, *self.factors.shape[1:])
        full = torch.zeros(shape, dtype=dtype, device=self.rows.device)
        full[self.rows] = 1 if self.factors is None else self.factors.to(dtype)
        return full


@dataclass
class Samples:
    """What a decision is taken on: (N,) delight, scores and validity.

    ``scores`` is None where they are random, ``valid`` None where every sample is.

    Attributes:
        norm: of the gradients; None where they are not known.
        advantages: of each sample, where a rule gives factors.
        surprisal: of each sample, where a rule of the user's is asked.
        factors: where these were decided on already, on the host.
        rows: what a function of the user's was shown of them, each a row.
        begins: which are the first position of a row, where a draw has to know it.
    """

    delight: Tensor
    scores: Tensor | None
    valid: Tensor | None
    norm: Tensor | None = None
    advantages: Tensor | None = None
    surprisal: Tensor | None = None
    factors: Tensor | None = None
    rows: Rows | None = None
    begins: Tensor | None = None


def check_finite(scores: Tensor, delight: Tensor) -> None:
    """Raise ValueError if a score or a delight is NaN or infinite."""
    finite = scores.isfinite() if scores is delight else scores.isfinite() & delight.isfinite()
    if not finite.all():
        bad = (~finite).nonzero().flatten()
        raise ValueError(
            f"delight is NaN or infinite in {len(bad)} of {len(scores)} samples (first: {bad[0].item()}); "
            "look for an infinite log-prob or advantage in the loss. Nothing was added to the gradients."
        )


def ask_finite(back: Readback, scores: Tensor, delight: Tensor) -> None:
    """Have the same looked at when ``back`` is read."""
    ends = [*scores.aminmax(), *(() if delight is scores else delight.aminmax())]

    def check(found: list[float]) -> None:
        if not all(map(math.isfinite, found)):
            check_finite(scores.to(delight.device), delight)

    back.ask(ends, check)


def any_of_row(factors: Tensor) -> Tensor:
    """(B,) bool: rows of (B,) or (B, P) factors with one that is not zero."""
    return factors.ne(0) if factors.dim() == 1 else factors.ne(0).any(1)


def joined(parts: list[Tensor]) -> Tensor:
    """The parts one after another."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def by_batch(rows: Tensor, sizes: list[int]) -> list[Tensor]:
    """Ascending indices into batches that follow each other, as indices into each."""
    if len(sizes) == 1:
        return [rows]
    ends = torch.tensor(sizes, device="cpu").cumsum(0)
    counts = torch.searchsorted(rows, to_device(ends, rows.device)).tolist()
    starts = [0, *ends.tolist()]
    return [rows[low:high] - start for low, high, start in zip([0, *counts], counts, starts, strict=False)]


def forced_mask(rows: Tensor, n: int) -> Tensor:
    """(n,) bool from a bool mask or from indices; raises ValueError if they do not fit."""
    if rows.dtype == torch.bool:
        if len(rows) != n:
            raise ValueError(f"force: the mask has {len(rows)} entries, the population {n}")
        return rows
    if len(rows) and (rows.min() < 0 or rows.max() >= n):
        raise ValueError(f"force: row indices must be in [0, {n}), got {rows.tolist()}")
    mask = torch.zeros(n, dtype=torch.bool, device=rows.device)
    mask[rows] = True
    return mask
