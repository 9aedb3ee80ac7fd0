"""Counters of what the gate has done."""

import math
from dataclasses import dataclass

from kondo_hooks.rules.samples import Decision

_NAN = float("nan")


@dataclass
class Stats:
    """What the gate has done since it was made.

    Attributes:
        steps: decisions taken, and backwards that passed straight through.
        rows: samples seen (rows, or tokens when ``unit="token"``).
        kept: samples kept.
        forwarded: rows run with a graph. Above the kept rows where a whole batch had to be replayed.
        rows_screened: rows that ``forwarded`` is to be compared with.
        price: the price of the last decision, in advantage x nats.
        decided: samples decided on, so without those that passed straight through.
        decided_kept: samples kept of these.
        without_gradient: fraction of the samples of the last decision that have no gradient, where the rule asks.
        noise: what the last draw added to the second moment of the gradient at the model's outputs, relative to it:
            ``sum n^2 / p`` over ``sum n^2``, less one.
        largest_factor: the largest factor on a kept sample's gradient in the last decision.
        seconds_screen: what a gated step takes beside its replay: calls of the model, and what the gate adds.
        seconds_replay: what the replay takes of as many rows as the last decision kept.
        seconds_ungated: what the calls and the backward take in a step that passed straight through.
        sum_delight: total delight of the samples decided on, advantage x nats.
        sum_delight_kept: total delight of the samples kept of these.
        waiting_bytes: most bytes that rows waiting for their window held.
        imbalance: with ``scope="global"``, the busiest rank's kept rows over the ranks' mean, at the last decision; 1
            is even.
        imbalance_balanced: the same of the rows that ranks replayed, after ``balance=True`` moved some.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
        >>> def loss(logits):
        ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
        >>> with kondo.gated(model, rate=0.1) as gate:
        ...     loss(model(obs)).backward()
        >>> gate.stats.rows, gate.stats.kept, gate.stats.rate
        (20, 2, 0.1)
        >>> sorted(gate.stats.metrics(kondo.Stats()))[:2]
        ['kondo/delight_dropped', 'kondo/delight_kept']
    """

    steps: int = 0
    rows: int = 0
    kept: int = 0
    forwarded: int = 0
    rows_screened: int = 0
    price: float = _NAN
    decided: int = 0
    decided_kept: int = 0
    without_gradient: float = _NAN
    noise: float = _NAN
    largest_factor: float = _NAN
    seconds_screen: float = _NAN
    seconds_replay: float = _NAN
    seconds_ungated: float = _NAN
    sum_delight: float = 0.0
    sum_delight_kept: float = 0.0
    waiting_bytes: int = 0
    imbalance: float = _NAN
    imbalance_balanced: float = _NAN

    @property
    def rate(self) -> float:
        """Effective rate: kept / seen."""
        return self.kept / self.rows if self.rows else _NAN

    @property
    def skipped(self) -> float:
        """Fraction of rows that never built a graph."""
        return 1 - self.forwarded / self.rows_screened if self.rows_screened else _NAN

    @property
    def delight_kept(self) -> float:
        """Mean delight of the samples that a decision kept."""
        return self.sum_delight_kept / self.decided_kept if self.decided_kept else _NAN

    @property
    def delight_dropped(self) -> float:
        """Mean delight of the samples that a decision dropped."""
        dropped = self.decided - self.decided_kept
        return (self.sum_delight - self.sum_delight_kept) / dropped if dropped else _NAN

    def metrics(self, since: "Stats", prefix: str = "kondo") -> dict[str, float]:
        """What a dashboard shows, over the steps since an earlier copy of these counters; no NaN among it.

        Effective rate, kept samples, fraction of rows without a graph, mean delight of kept and of dropped samples, and
        of the last decision the price, or where the rule draws its noise, the largest factor and the fraction of
        samples without a gradient.
        """
        now, before = vars(self), vars(since)
        counted = Stats(**{name: now[name] - before[name] for name in now})
        values = {
            "rate": counted.rate,
            "kept": counted.kept,
            "skipped": counted.skipped,
            "delight_kept": counted.delight_kept,
            "delight_dropped": counted.delight_dropped,
            "price": self.price,
            "without_gradient": self.without_gradient,
            "noise": self.noise,
            "largest_factor": self.largest_factor,
            "seconds_screen": self.seconds_screen,
            "seconds_replay": self.seconds_replay,
            "seconds_ungated": self.seconds_ungated,
        }
        return {f"{prefix}/{name}": value for name, value in values.items() if math.isfinite(value)}

    def decision(self, decision: Decision) -> None:
        """Count a decision. Where no policy was found the delight of all samples is not known from then on."""
        self.steps += 1
        self.rows += decision.samples
        self.kept += len(decision.kept)
        self.decided += decision.samples
        self.decided_kept += len(decision.kept)
        self.sum_delight += decision.sum_delight
        self.sum_delight_kept += decision.sum_delight_kept
        self.price = decision.price
        self.without_gradient, self.noise = decision.without_gradient, decision.noise
        self.largest_factor = decision.largest_factor

    def time(self, screen: float, replay: float, ungated: float) -> None:
        """Note what steps take."""
        self.seconds_screen, self.seconds_replay, self.seconds_ungated = screen, replay, ungated

    def spread(self, kept: float, replayed: float) -> None:
        """Note how unevenly kept and replayed rows were spread over ranks."""
        self.imbalance, self.imbalance_balanced = kept, replayed

    def replayed(self, forwarded: int, screened: int) -> None:
        """Count rows run with a graph, of rows screened."""
        self.forwarded += forwarded
        self.rows_screened += screened

    def ungated(self, rows: int) -> None:
        """Count rows that passed straight through."""
        self.rows += rows
        self.kept += rows
        self.replayed(rows, rows)

    def __repr__(self) -> str:
        return (
            f"Stats(steps={self.steps}, rows={self.rows}, kept={self.kept} ({self.rate:.1%}), "
            f"forwarded={self.forwarded}, skipped={self.skipped:.1%}, price={self.price:.4g}, "
            f"delight_kept={self.delight_kept:.4g}, delight_dropped={self.delight_dropped:.4g})"
        )
