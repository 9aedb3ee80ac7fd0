"""What a user asks of a gate."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Unit = Literal["sample", "token", "prefix"]
Reduction = Literal["sum", "mean", "max"]
Weight = Literal["pg", "dg"]
Normalize = Literal["batch", "kept"]

_PRIORITIES = ("delight", "advantage", "abs_advantage", "surprisal", "additive", "uniform", "norm")
Rate = float | Literal["lossless", "auto"] | Callable[[int], float]
RuleFunction = Callable[[Any], Any]
"""From the rows of a population, :class:`kondo_hooks.Rows`, to one number each."""


@dataclass(frozen=True)
class additive:  # noqa: N801 - reads as a value: priority=additive(0.3)
    """The priority ``alpha * advantage + (1 - alpha) * surprisal``, a control that the paper rejects.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> signal = kondo.Signal.of(torch.tensor([-2.0]), advantages=torch.tensor([1.0]))
        >>> signal.score(kondo.additive(0.25))  # a quarter of the advantage, three of the surprisal
        tensor([1.7500])
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")


@dataclass(frozen=True)
class SelectionConfig:
    """How samples are chosen and weighted. Validated when it is made.

    Args:
        rate: fraction of samples to keep, in (0, 1], or a function of the step that returns one; "lossless" drops
            exactly the samples without a gradient; "auto" draws as ``noise`` does, as many as seconds times noise are
            least, and passes straight through where a step of all rows is cheaper.
            Exactly one of ``rate``, ``price``, ``noise`` and ``rule`` is set.
        price: keep samples whose score is above this, in advantage x nats; 0 is the adaptive gate.
        noise: draw the fewest samples for which ``sum n^2 / p`` is at most ``(1 + noise) sum n^2``: ``n`` is the norm
            of a sample's gradient at the model's outputs, ``p = min(1, c n)`` the probability that it is kept, and a
            kept sample weighs ``1 / p``, so that every term of the loss stays unbiased. 0 keeps all that have one.
        rule: a function of :class:`Rows` that returns a factor on each sample's gradient, 0 where it is dropped.
        priority: what samples are ranked by: "delight", "advantage", "abs_advantage", "surprisal",
            "additive" (or ``additive(alpha)``), "norm" (of the gradient at the model's outputs), "uniform" (random
            rows, the control to beat), or a function of :class:`Rows` that returns a score for each sample.
        groups: how many rows that follow each other are one prompt's, for rules that compare these.
        temperature: softness ``eta`` of the Bernoulli and soft gates, in units of the score.
        hard: False weights every sample by ``sigmoid((score - price) / temperature)``: nothing is skipped.
        deterministic: False draws ``G ~ Bernoulli(sigmoid((score - price) / temperature))``.
        unit: "sample" keeps or drops whole rows, "token" single positions; "prefix" single positions, of which a draw
            takes the first so many of a row, and a row is replayed no further than to its last kept one.
        reduction: how a row's score comes from its positions: "sum", "mean" or "max".
        history: with ``rate``, take the price from the last ``history`` decisions, so that the long-run
            kept fraction is ``rate`` even where ``rate * batch`` is less than one row. 0: this batch alone.
        weight: "pg" keeps the user's gradient; "dg" multiplies kept samples by ``sigmoid(delight)``.
        unbiased: with a ``rate``, draw samples in proportion to the size of their score, and divide them by the
            probability of that; with ``deterministic=False``, divide by the Bernoulli gate's.
        normalize: "batch" keeps the user's denominators; "kept" rescales by samples / kept samples.
        seed: of the gate's own generator.

    Examples:
        >>> import kondo_hooks as kondo
        >>> kondo.SelectionConfig(rate=0.1).priority
        'delight'
        >>> kondo.SelectionConfig(rate=0.1, price=0.0)
        Traceback (most recent call last):
        ...
        ValueError: ...
    """

    rate: Rate | None = None
    price: float | None = None
    noise: float | None = None
    rule: RuleFunction | None = None
    priority: str | additive | RuleFunction = "delight"
    groups: int | None = None
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
        ways = [name for name in ("rate", "price", "noise", "rule") if getattr(self, name) is not None]
        if not ways:
            raise ValueError("give exactly one of rate, price, noise and rule")
        if len(ways) > 1:
            raise ValueError(f"give exactly one of {' and '.join(ways)}: each says how many samples are kept")
        if not (self.rate is None or callable(self.rate) or self.rate == "lossless" or self.rate == "auto"):
            check_rate(self.rate)
        if self.noise is not None and not (is_number(self.noise) and 0 <= self.noise < math.inf):
            raise ValueError(f"noise must be a number >= 0, got {self.noise!r}")
        if self.rule is not None and not callable(self.rule):
            raise ValueError(f"rule must be a function of the rows, got {self.rule!r}")
        if self.price is not None and not (is_number(self.price) and math.isfinite(self.price)):
            raise ValueError(f"price must be finite, got {self.price!r}")
        if not (isinstance(self.priority, additive) or callable(self.priority) or self.priority in _PRIORITIES):
            raise ValueError(
                f"priority must be one of {', '.join(_PRIORITIES)}, or a function of the rows, got {self.priority!r}"
            )
        if self.price is not None and self.priority == "norm":
            raise ValueError("price is in advantage x nats, and priority='norm' is not: give rate or noise")
        if self.groups is not None and (
            isinstance(self.groups, bool) or not isinstance(self.groups, int) or self.groups < 1
        ):
            raise ValueError(f"groups must be a number of rows >= 1, got {self.groups!r}")
        if self.groups is not None and self.tokens:
            raise ValueError("groups are of rows: they need unit='sample'")
        if not (is_number(self.temperature) and 0 < self.temperature < math.inf):
            raise ValueError(f"temperature must be > 0 and finite, got {self.temperature!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        for name, allowed in (
            ("unit", ("sample", "token", "prefix")),
            ("reduction", ("sum", "mean", "max")),
            ("weight", ("pg", "dg")),
            ("normalize", ("batch", "kept")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if isinstance(self.history, bool) or not isinstance(self.history, int) or self.history < 0:
            raise ValueError(f"history must be a number of decisions >= 0, got {self.history!r}")
        if self.history and not self.has_share:
            raise ValueError("history sets the price from a rate: give rate as a fraction")
        if self.unbiased and not self.hard:
            raise ValueError("unbiased=True divides by a keep-probability, and hard=False keeps every sample")
        if self.unbiased and self.price is not None and self.deterministic:
            raise ValueError("unbiased=True divides by a keep-probability: with price it needs deterministic=False")
        if self.unbiased and self.rule is not None:
            raise ValueError("unbiased=True: the factors of a rule are its own; return 1 / probability from it")
        if self.rate == "auto" and self.tokens:
            raise ValueError("rate='auto' weighs the seconds of rows: it needs unit='sample'; noise= takes tokens")
        if self.weighs:
            self._check_weighs()

    def _check_weighs(self) -> None:
        """Refuse what a rule that gives factors has no use for."""
        name = next((name for name in ("noise", "rule") if getattr(self, name) is not None), None)
        told = f"{name}=" if name else f"rate={self.rate!r}" if isinstance(self.rate, str) else "unbiased=True"
        if not (self.hard and self.deterministic):
            raise ValueError(f"{told} says which samples are kept: leave hard and deterministic away")
        if self.history:
            raise ValueError(f"{told} takes no price from the past: leave history away")
        if self.normalize == "kept" and not self.rule:
            raise ValueError(f"{told} weighs the kept samples for the others already: leave normalize away")
        if self.priority != "delight" and not self.has_share:
            raise ValueError(f"{told} goes by the gradients themselves: leave priority away")

    def told(self) -> str:
        """The rule as it is written: "rate=0.03, priority='delight'"."""
        name = next(name for name in ("rate", "price", "noise", "rule") if getattr(self, name) is not None)
        value = getattr(self, name)
        by = f"{name}={getattr(value, '__qualname__', repr(value))}"
        priority = getattr(self.priority, "__qualname__", repr(self.priority))
        return f"{by}, priority={priority}" if self.has_share or self.price is not None else by

    @property
    def has_share(self) -> bool:
        """Whether a fraction of the samples is kept."""
        return self.rate is not None and not isinstance(self.rate, str)

    @property
    def tokens(self) -> bool:
        """Whether samples are positions of rows."""
        return self.unit != "sample"

    @property
    def weighs(self) -> bool:
        """Whether each sample gets a factor, 0 where it is dropped, instead of a rank."""
        drawn = self.unbiased and self.deterministic and self.has_share
        return self.noise is not None or self.rule is not None or isinstance(self.rate, str) or drawn

    @property
    def needs_delight(self) -> bool:
        """Whether samples cannot be chosen without their delight."""
        if self.rule is not None:
            without = not getattr(self.rule, "needs_policy", True)
        else:
            without = self.priority in ("norm", "uniform") or (self.weighs and not self.has_share)
        return not without or self.weight == "dg"

    @property
    def asks(self) -> bool:
        """Whether a function of the user's says what becomes of the samples."""
        return self.rule is not None or callable(self.priority)

    @property
    def needs_norm(self) -> bool:
        """Whether samples cannot be chosen without the norm of their gradients."""
        return self.priority == "norm" or (self.weighs and not self.has_share and self.rule is None)

    @property
    def reweighs(self) -> bool:
        """Whether a kept sample's gradient may be another than the loss sent, or be cut."""
        weighs = self.weighs and not self.is_lossless
        return weighs or not self.hard or self.weight != "pg" or self.tokens

    @property
    def is_lossless(self) -> bool:
        """Whether exactly the samples without a gradient are dropped."""
        return self.rate == "lossless"

    @property
    def is_fair(self) -> bool:
        """Whether the kept samples are a fair sample of all of them, or weigh as one."""
        if self.rule is not None:
            return bool(getattr(self.rule, "unbiased", False))
        if self.weighs:
            return not self.has_share or self.priority in ("norm", "uniform")
        return self.priority == "uniform" or (self.unbiased and self.hard)


def is_number(value: Any) -> bool:
    """Whether it is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_rate(rate: Any) -> float:
    """Return ``rate`` if it is in (0, 1], else raise ValueError."""
    if not is_number(rate) or not 0 < rate <= 1:
        raise ValueError(f"rate must be in (0, 1], or 'lossless', or 'auto', got {rate!r}")
    return float(rate)
