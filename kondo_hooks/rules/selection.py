"""Which samples are worth a backward: pure tensor maths, no model.

Delight is ``chi = U * ell``: advantage times surprisal, ``ell = -log pi(a)``. The gate pays for a
sample's backward only when its delight beats a price (Osband 2026, arXiv 2603.20526).
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kondo_hooks.rules.readback import Readback, to_device

Unit = Literal["sample", "token"]
Reduction = Literal["sum", "mean", "max"]
Weight = Literal["pg", "dg"]
Normalize = Literal["batch", "kept"]

_PRIORITIES = ("delight", "advantage", "abs_advantage", "surprisal", "additive", "uniform")


@dataclass(frozen=True)
class additive:  # noqa: N801 - reads as a value: priority=additive(0.3)
    """The priority ``alpha * advantage + (1 - alpha) * surprisal``, a control that the paper rejects."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")


@dataclass(frozen=True)
class SelectionConfig:
    """How samples are chosen and weighted. Validated when it is made.

    Args:
        rate: fraction of samples to keep, in (0, 1], or a function of the step that returns one.
            Exactly one of ``rate`` and ``price`` is set.
        price: keep samples whose score is above this, in advantage x nats; 0 is the adaptive gate.
        priority: what samples are ranked by: "delight", "advantage", "abs_advantage", "surprisal",
            "additive" (or ``additive(alpha)``), "uniform" (random rows, the control to beat).
        temperature: softness ``eta`` of the Bernoulli and soft gates, in units of the score.
        hard: False weights every sample by ``sigmoid((score - price) / temperature)``: nothing is skipped.
        deterministic: False draws ``G ~ Bernoulli(sigmoid((score - price) / temperature))``.
        unit: "sample" keeps or drops whole rows, "token" single positions.
        reduction: how a row's score comes from its positions: "sum", "mean" or "max".
        history: with ``rate``, take the price from the last ``history`` decisions, so that the long-run
            kept fraction is ``rate`` even where ``rate * batch`` is less than one row. 0: this batch alone.
        weight: "pg" keeps the user's gradient; "dg" multiplies kept samples by ``sigmoid(delight)``.
        unbiased: divide kept samples by their keep-probability (Bernoulli gate only).
        normalize: "batch" keeps the user's denominators; "kept" rescales by samples / kept samples.
        seed: of the gate's own generator.
    """

    rate: float | Callable[[int], float] | None = None
    price: float | None = None
    priority: str | additive = "delight"
    temperature: float = 0.1
    hard: bool = True
    deterministic: bool = True
    unit: Unit = "sample"
    reduction: Reduction = "sum"
    history: int = 0
    weight: Weight = "pg"
    unbiased: bool = False
    normalize: Normalize = "batch"
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.price is None):
            raise ValueError("give exactly one of rate and price")
        if self.rate is not None and not callable(self.rate):
            check_rate(self.rate)
        if self.price is not None and not (is_number(self.price) and math.isfinite(self.price)):
            raise ValueError(f"price must be finite, got {self.price!r}")
        if not (isinstance(self.priority, additive) or self.priority in _PRIORITIES):
            raise ValueError(f"priority must be one of {', '.join(_PRIORITIES)}, got {self.priority!r}")
        if not (is_number(self.temperature) and 0 < self.temperature < math.inf):
            raise ValueError(f"temperature must be > 0 and finite, got {self.temperature!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        for name, allowed in (
            ("unit", ("sample", "token")),
            ("reduction", ("sum", "mean", "max")),
            ("weight", ("pg", "dg")),
            ("normalize", ("batch", "kept")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if isinstance(self.history, bool) or not isinstance(self.history, int) or self.history < 0:
            raise ValueError(f"history must be a number of decisions >= 0, got {self.history!r}")
        if self.history and self.rate is None:
            raise ValueError("history sets the price from a rate: give rate, not price")
        if self.unbiased and (self.deterministic or not self.hard):
            raise ValueError("unbiased=True divides by a keep-probability: it needs deterministic=False")


def is_number(value: Any) -> bool:
    """Whether it is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_rate(rate: float) -> float:
    """Return ``rate`` if it is in (0, 1], else raise ValueError."""
    if not is_number(rate) or not 0 < rate <= 1:
        raise ValueError(f"rate must be in (0, 1], got {rate!r}")
    return float(rate)


@dataclass
class Signal:
    """What is known of each sample: advantage, surprisal, and where they mean something.

    All three have the same shape, (B,) or (B, T). ``valid`` is False on padding and masked positions. ``draws`` are the
    samples' random scores, where these were drawn already.
    """

    advantages: Tensor
    surprisal: Tensor
    valid: Tensor
    draws: Tensor | None = None

    @classmethod
    def of(cls, logp: Tensor, advantages: Tensor, mask: Tensor | None = None) -> "Signal":
        """Check and align log-probs (B,) or (B, T), advantages (B,) or (B, T), mask (B,) or (B, T)."""
        if not isinstance(logp, Tensor) or logp.dim() not in (1, 2):
            raise ValueError(f"logp must be a tensor of shape (B,) or (B, T), got {_shape(logp)}")
        logp = logp.detach()
        advantages = _like("advantages", advantages, logp)
        valid = torch.ones_like(logp, dtype=torch.bool) if mask is None else _like("mask", mask, logp) != 0
        return cls(advantages, -logp, valid)

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
class Decision:
    """What the gate decided for one population of N samples (rows, or tokens when ``unit="token"``).

    Attributes:
        delight: (N,) advantage x nats.
        kept: (K,) indices into the population, ascending.
        weights: (K,) factors on the kept samples' gradients, or None for all ones.
        price: the score that a sample had to beat.
        rate: K / N.
        scale: the loss's own scale ``s`` that was divided out of the delight (1/N for a mean).
        samples: how many were chosen from: N, less the invalid tokens.
        sum_delight: total delight of all samples.
        sum_delight_kept: total delight of the kept ones.
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

    def __post_init__(self) -> None:
        if self.samples < 0:
            self.samples = len(self.delight)

    def factors(self) -> Tensor:
        """(N,) factor on each sample's gradient, 0 where it was dropped."""
        factors = self.delight.new_zeros(len(self.delight))
        factors[self.kept] = 1 if self.weights is None else self.weights.to(factors.dtype)
        return factors

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
        rows = _any_of_row(factors).nonzero().flatten()
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
    """

    delight: Tensor
    scores: Tensor | None
    valid: Tensor | None


def check_finite(scores: Tensor, delight: Tensor) -> None:
    """Raise ValueError if a score or a delight is NaN or infinite."""
    finite = scores.isfinite() if scores is delight else scores.isfinite() & delight.isfinite()
    if not finite.all():
        bad = (~finite).nonzero().flatten()
        raise ValueError(
            f"delight is NaN or infinite in {len(bad)} of {len(scores)} samples (first: {bad[0].item()}); "
            "look for an infinite log-prob or advantage in the loss. Nothing was added to the gradients."
        )


def _ask_finite(back: Readback, scores: Tensor, delight: Tensor) -> None:
    ends = [*scores.aminmax(), *(() if delight is scores else delight.aminmax())]

    def check(found: list[float]) -> None:
        if not all(map(math.isfinite, found)):
            check_finite(scores.to(delight.device), delight)

    back.ask(ends, check)


def _any_of_row(factors: Tensor) -> Tensor:
    """(B,) bool: rows of (B,) or (B, P) factors with one that is not zero."""
    return factors.ne(0) if factors.dim() == 1 else factors.ne(0).any(1)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def by_batch(rows: Tensor, sizes: list[int]) -> list[Tensor]:
    """Ascending indices into batches that follow each other, as indices into each."""
    if len(sizes) == 1:
        return [rows]
    ends = torch.tensor(sizes, device="cpu").cumsum(0)
    counts = torch.searchsorted(rows, to_device(ends, rows.device)).tolist()
    starts = [0, *ends.tolist()]
    return [rows[low:high] - start for low, high, start in zip([0, *counts], counts, starts, strict=False)]


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest of (N,) scores, ascending; ties go to the lower index."""
    return _top(scores, k)[0]


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same, and these scores in descending order."""
    ordered = torch.sort(scores, descending=True, stable=True)
    return ordered.indices[:k].sort().values, ordered.values[:k]


def gate_probability(scores: Tensor, price: float | Tensor, temperature: float) -> Tensor:
    """``sigmoid((score - price) / temperature)``, the keep-probability of the paper's Algorithm 1."""
    return torch.sigmoid((scores - price) / temperature)


def quantile_price(scores: Tensor, rate: float) -> Tensor:
    """The (1 - rate)-quantile of the scores, linear between neighbours, for any number of them."""
    ordered = scores.reshape(-1).sort().values
    position = (1 - rate) * (len(ordered) - 1)
    low = int(position)
    return torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], position - low)


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


class Selector:
    """Applies a SelectionConfig, and holds the state that lasts: step, history, generator.

    Args:
        config: what to apply.
        stream: number of the random stream, for ranks that draw on their own.
    """

    def __init__(self, config: SelectionConfig, stream: int = 0):
        self.config = config
        self.step = 0
        self._generator = torch.Generator("cpu").manual_seed(config.seed + stream)
        self._history: deque[Tensor] = deque(maxlen=config.history)
        self._credit = 0.0

    def reseed(self, stream: int) -> None:
        """Draw from another random stream, from its start."""
        self._generator.manual_seed(self.config.seed + stream)

    def rate(self) -> float | None:
        """The rate of the coming decision; None when a price is set instead."""
        rate = self.config.rate
        return check_rate(rate(self.step)) if callable(rate) else rate

    def uniform(self, n: int) -> Tensor:
        """(n,) random scores from the gate's own generator."""
        return torch.rand(n, generator=self._generator, device="cpu")

    def __call__(
        self, delight: Tensor, scores: Tensor, forced: Tensor | None = None, back: Readback | None = None
    ) -> Decision:
        """Decide on N samples and count the step.

        Args:
            delight: (N,) advantage x nats; for the record and for ``weight="dg"``.
            scores: (N,) what the samples are ranked by; on the host where they are random.
            forced: (N,) bool, samples that are kept whatever their score; they count towards ``rate``.
            back: brings the numbers that are not needed to choose, and the error, when it is read; then the decision
                has to be undone by its caller.

        Raises:
            ValueError: if N is 0 or a score is not finite.
        """
        if scores.numel() == 0:
            raise ValueError("the gate was given an empty batch: there is no row to choose from")
        ranked = scores
        if forced is not None and forced.any():
            scores = scores.to(forced.device)
            ranked = scores.masked_fill(forced, torch.inf)
            scores, delight = (torch.where(forced & ~t.isfinite(), 0, t) for t in (scores, delight))
        if back is None or self.config.history:
            check_finite(scores, delight)
        else:
            _ask_finite(back, scores, delight)
        kept, probability, price = self._choose(ranked, scores)
        kept = to_device(kept, delight.device)
        probability = None if probability is None else to_device(probability, delight.device)
        weights = self._weights(delight, kept, probability)
        self.step += 1
        decision = Decision(delight, kept, weights, math.nan, len(kept) / len(scores))

        def note(values: list[float]) -> None:
            (decision.price,) = values

        reading = Readback() if back is None else back
        if isinstance(price, Tensor):
            reading.ask([price], note)
        else:
            decision.price = float(price)
        decision.count(reading)
        if back is None:
            reading.read()
        return decision

    def samples(self, signals: list[Signal]) -> "Samples":
        """What is chosen among: one sample a row, or one a position when ``unit="token"``."""
        config = self.config
        tokens = config.unit == "token"

        def each(signal: Signal, values: Tensor) -> Tensor:
            values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
            return values.reshape(-1) if tokens else signal.reduce(values, config.reduction)

        device = signals[0].advantages.device
        delight = _joined([each(s, s.delight).to(device) for s in signals])
        if config.priority == "delight":
            scores: Tensor | None = delight
        elif config.priority == "uniform":
            scores = None
            if any(s.draws is not None for s in signals):
                for s in signals:
                    if s.draws is None:
                        self.draw(s)
                scores = torch.cat([s.draws for s in signals if s.draws is not None])
        else:
            scores = _joined([each(s, s.score(config.priority)).to(device) for s in signals])
        valid = torch.cat([s.valid.reshape(-1).to(device) for s in signals]) if tokens else None
        return Samples(delight, scores, valid)

    def choose(self, samples: "Samples", forced: Tensor | None = None, back: Readback | None = None) -> Decision:
        """Decide on the valid samples; the decision's indices are into all of them. Arguments as of a call."""
        delight, scores = samples.delight, samples.scores
        if scores is None:
            scores = self.uniform(len(delight))
        if samples.valid is None:
            return self(delight, scores, forced, back)
        index = samples.valid.nonzero().flatten()
        if len(index) == len(delight):
            return self(delight, scores, forced, back)
        if not len(index):
            self.step += 1
            return Decision(delight, index, None, math.nan, math.nan, samples=0, sum_delight=0.0, sum_delight_kept=0.0)
        chosen = delight[index]
        decision = self(
            chosen,
            chosen if scores is delight else scores[index.to(scores.device)],
            None if forced is None else forced[index],
            back,
        )
        decision.delight, decision.kept = delight, index[decision.kept]
        return decision

    def kept_of(self, decision: Decision, signals: list[Signal]) -> list[Kept]:
        """What a decision over several batches keeps of each; waits for the device once if there are several."""
        if self.config.unit == "token":
            factors = self.split(decision.factors(), signals)
            rows = torch.cat([_any_of_row(f) for f in factors]).nonzero().flatten()
            each = by_batch(rows, [len(f) for f in factors])
            return [Kept(mine, f[mine]) for mine, f in zip(each, factors, strict=True)]
        each = by_batch(decision.kept, [len(signal.valid) for signal in signals])
        if decision.weights is None:
            return [Kept(mine, None) for mine in each]
        weights = decision.weights.split([len(mine) for mine in each])
        return [Kept(mine, w) for mine, w in zip(each, weights, strict=True)]

    def split(self, values: Tensor, signals: list[Signal]) -> list[Tensor]:
        """Values of the samples, batch by batch, in the shape of its rows, or of its positions."""
        tokens = self.config.unit == "token"
        shapes = [s.valid.shape if tokens else s.valid.shape[:1] for s in signals]
        parts = values.split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def most(self, expected: float) -> int | None:
        """The most of this many samples that a decision by rank keeps; None where it is not by rank."""
        config = self.config
        if config.price is not None or config.history or not (config.hard and config.deterministic):
            return None
        rate = self.rate()
        assert rate is not None
        return max(1, math.ceil(rate * expected + 0.5))

    def draw(self, signal: Signal) -> None:
        """Rank a batch by random numbers before the decision, where that is by these alone."""
        config = self.config
        if config.priority == "uniform" and config.hard and config.deterministic and not config.history:
            n = signal.valid.numel() if config.unit == "token" else len(signal.valid)
            signal.draws = self.uniform(n)

    def _choose(self, ranked: Tensor, scores: Tensor) -> tuple[Tensor, Tensor | None, float | Tensor]:
        config, rate, n = self.config, self.rate(), len(scores)
        fixed = config.price if config.price is not None else math.nan  # not used where there is a rate
        if not (config.hard and config.deterministic):
            price = fixed if rate is None else self._quantile(scores, rate)
            probability = gate_probability(ranked, price, config.temperature)
            if not config.hard:
                return torch.arange(n, device=scores.device), probability, price
            draws = to_device(self.uniform(n), scores.device)
            kept = (draws < probability).nonzero().flatten()
            self._count(rate, n, len(kept))
            return kept, probability, price
        if rate is None:
            return (ranked > fixed).nonzero().flatten(), None, fixed
        if config.history:
            price = self._quantile(scores, rate)
            kept = self._pay(ranked, price, rate)
            return kept, None, price
        forced = int((ranked == torch.inf).sum()) if ranked is not scores else 0
        kept, highest = _top(ranked, max(1, round(rate * n), forced))
        return kept, None, highest[-1]

    def _quantile(self, scores: Tensor, rate: float) -> Tensor:
        """The price that keeps ``rate`` of this batch and of the last decisions, less what is owed."""
        if not self.config.history:
            return quantile_price(scores, rate)
        self._history.append(scores.detach().to("cpu", copy=True))
        pool = torch.cat(list(self._history))
        # Drift makes a quantile keep more or fewer than asked; what is owed is paid back over the length of the
        # history, so that the long-run fraction is the rate.
        target = min(1.0, max(0.0, rate + self._credit / len(pool)))
        ordered = pool.sort().values
        return ordered[min(int((1 - target) * len(pool)), len(pool) - 1)].to(scores.device)

    def _pay(self, ranked: Tensor, price: Tensor, rate: float) -> Tensor:
        """Indices above the price, and of those at the price as many as are owed, by index."""
        above = ranked > price
        owed = self._credit + rate * len(ranked) - int(above.sum())
        at_price = (ranked == price).nonzero().flatten()[: max(0, math.floor(owed + 1e-9))]
        above[at_price] = True
        kept = above.nonzero().flatten()
        self._count(rate, len(ranked), len(kept))
        return kept

    def _count(self, rate: float | None, n: int, kept: int) -> None:
        if self.config.history and rate is not None:
            self._credit += rate * n - kept

    def _weights(self, delight: Tensor, kept: Tensor, probability: Tensor | None) -> Tensor | None:
        config = self.config
        factors = []
        if probability is not None and not config.hard:
            factors.append(probability)
        if config.weight == "dg":
            factors.append(torch.sigmoid(delight[kept]))
        if config.unbiased and probability is not None:
            factors.append(1 / probability[kept])
        if config.normalize == "kept" and len(kept):
            factors.append(torch.full_like(delight[kept], len(delight) / len(kept)))
        if not factors:
            return None
        return torch.stack(factors).prod(0)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next decision depends on."""
        return {
            "step": self.step,
            "credit": self._credit,
            "history": list(self._history),  # never written to: a backward takes this state each time
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self.step = state["step"]
        self._credit = state["credit"]
        # Both live on the host, wherever a checkpoint's map_location has put them.
        self._history = deque((scores.cpu() for scores in state["history"]), maxlen=self.config.history)
        self._generator.set_state(state["generator"].cpu())
