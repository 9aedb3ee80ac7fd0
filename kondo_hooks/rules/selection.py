"""Which samples are worth a backward: pure tensor maths, no model.

Delight is ``chi = U * ell``: advantage times surprisal, ``ell = -log pi(a)``. The gate pays for a
sample's backward only when its delight beats a price (Osband 2026, arXiv 2603.20526).
"""

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from kondo_hooks.rules.config import SelectionConfig, check_rate
from kondo_hooks.rules.draw import gate_probability, quantile_price, ranked_first
from kondo_hooks.rules.readback import Readback, to_device
from kondo_hooks.rules.samples import (
    Decision,
    Kept,
    Samples,
    Signal,
    any_of_row,
    ask_finite,
    by_batch,
    check_finite,
    joined,
    mean_valid,
)
from kondo_hooks.rules.weigh import Costs, Drawn, Table, ask, draw, rows_of


class Selector:
    """Applies a SelectionConfig, and holds the state that lasts: step, history, generator.

    Args:
        config: what to apply.
        stream: number of the random stream, for ranks that draw on their own.

    Attributes:
        groups: which prompt each sample of the next population is an answer to, if that was told.
        costs: seconds that steps were measured to take, for ``rate="auto"``.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> selector = kondo.Selector(kondo.SelectionConfig(rate=0.5))
        >>> delight = torch.tensor([0.1, 3.0, 2.0, 0.0])
        >>> selector(delight, delight).kept
        tensor([1, 2])
    """

    def __init__(self, config: SelectionConfig, stream: int = 0):
        self.config = config
        self.step = 0
        self._generator = torch.Generator("cpu").manual_seed(config.seed + stream)
        self._history: deque[Tensor] = deque(maxlen=config.history)
        self._credit = 0.0
        self.groups: Tensor | None = None
        self.costs: Costs | None = None
        self._begun: list[Table] = []
        self._moments = 0.0

    def reseed(self, stream: int) -> None:
        """Draw from another random stream, from its start."""
        self._generator.manual_seed(self.config.seed + stream)

    def rate(self) -> float | None:
        """The rate of the coming decision; None where it is not by a share of the samples."""
        rate = self.config.rate
        return check_rate(rate(self.step)) if callable(rate) else None if isinstance(rate, str) else rate

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
            ask_finite(back, scores, delight)
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

    def samples(self, signals: list[Signal], pooled: bool = False) -> "Samples":
        """What is chosen among: one sample a row, or one a position.

        Args:
            signals: of the calls.
            pooled: they will be put together with other ranks', and a function of the user's asked then.
        """
        config = self.config
        tokens = config.tokens

        def each(signal: Signal, values: Tensor) -> Tensor:
            values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
            return values.reshape(-1) if tokens else signal.reduce(values, config.reduction)

        device = signals[0].advantages.device
        delight = joined([each(s, s.delight).to(device) for s in signals])
        valid = torch.cat([s.valid.reshape(-1).to(device) for s in signals]) if tokens else None
        norm = None
        if all(s.norm is not None for s in signals):
            norm = joined([s.norm.reshape(-1).to(device) for s in signals if s.norm is not None])
        if self.groups is not None and len(self.groups) != len(delight):
            told, self.groups = len(self.groups), None
            raise ValueError(f"groups: told for {told} samples, and the population has {len(delight)}")
        samples = Samples(delight, delight, valid, norm)
        if config.unit == "prefix":
            samples.begins = joined([_first_of_each_row(s.valid) for s in signals])
        as_rows = config.asks and not (pooled or tokens)  # the function is shown every position
        if (config.weighs or config.asks) and not as_rows:
            of_rows = [s.advantages.reshape(-1) if tokens else mean_valid(s.advantages, s.valid) for s in signals]
            samples.advantages = joined([t.to(delight) for t in of_rows])
        if config.asks:
            if not as_rows:
                samples.surprisal = joined([each(s, torch.where(s.valid, s.surprisal, 0)).to(delight) for s in signals])
            if not pooled:
                self._ask(samples, signals)
            return samples
        if config.weighs and any(s.factors is not None for s in signals):
            self.draw([s for s in signals if s.factors is None])
            samples.factors = joined([s.factors.reshape(-1) for s in signals if s.factors is not None])
            return samples
        if config.priority == "delight":
            scores: Tensor | None = delight
        elif config.priority == "norm":
            scores = self._norm_of(samples)
        elif config.priority == "uniform":
            scores = None
            if any(s.draws is not None for s in signals):
                self.draw([s for s in signals if s.draws is None])
                scores = torch.cat([s.draws for s in signals if s.draws is not None])
        else:
            assert not callable(config.priority)
            scores = joined([each(s, s.score(config.priority)).to(device) for s in signals])
        samples.scores = scores
        return samples

    def choose(self, samples: "Samples", forced: Tensor | None = None, back: Readback | None = None) -> Decision:
        """Decide on the valid samples; the decision's indices are into all of them. Arguments as of a call."""
        decision = self._choose_valid(samples, forced, back)
        decision.norm = samples.norm
        return decision

    def _choose_valid(self, samples: "Samples", forced: Tensor | None, back: Readback | None) -> Decision:
        delight, scores = samples.delight, samples.scores
        if self.config.weighs:
            return self._weigh(samples, forced)
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
        if self.config.tokens:
            factors = self.split(decision.factors(), signals)
            rows = torch.cat([any_of_row(f) for f in factors]).nonzero().flatten()
            each = by_batch(rows, [len(f) for f in factors])
            return [Kept(mine, f[mine]) for mine, f in zip(each, factors, strict=True)]
        each = by_batch(decision.kept, [len(signal.valid) for signal in signals])
        if decision.weights is None:
            return [Kept(mine, None) for mine in each]
        weights = decision.weights.split([len(mine) for mine in each])
        return [Kept(mine, w) for mine, w in zip(each, weights, strict=True)]

    def split(self, values: Tensor, signals: list[Signal]) -> list[Tensor]:
        """Values of the samples, batch by batch, in the shape of its rows, or of its positions."""
        tokens = self.config.tokens
        shapes = [s.valid.shape if tokens else s.valid.shape[:1] for s in signals]
        parts = values.split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _norm_of(self, samples: Samples) -> Tensor:
        if samples.norm is None:
            raise ValueError(
                "this rule goes by the norm of each sample's gradient, which is not known: preselect() takes norm=; "
                "with unit='token' the log-probs must be in the order of the model's output (mark them: gate.logp(...))"
            )
        return samples.norm

    def pool(self, samples: Samples) -> None:
        """Ask a function of the user's about the samples of several ranks."""
        if self.config.asks:
            self._ask(samples, None)

    def _ask(self, samples: Samples, signals: list[Signal] | None) -> None:
        config, tokens = self.config, self.config.tokens
        groups = config.groups if self.groups is None else self.groups
        pooled = signals is None
        rows = rows_of(signals or [], samples, tokens, groups, self.step, self._generator, pooled)
        name, function = ("rule", config.rule) if config.rule is not None else ("priority", config.priority)
        assert callable(function)
        samples.rows = None if tokens else rows
        values = ask(function, rows, name)
        if tokens and samples.valid is not None:
            every = torch.zeros(len(samples.delight), dtype=values.dtype, device="cpu")
            every[samples.valid.cpu()] = values
            values = every
        if config.rule is not None:
            samples.factors = values
        else:
            samples.scores = values

    def _weigh(self, samples: Samples, forced: Tensor | None) -> Decision:
        """Decide by factors; everything is worked out on the host."""
        config, delight = self.config, samples.delight
        if not len(delight):
            raise ValueError("the gate was given an empty batch: there is no row to choose from")
        table = self._table(samples, forced)
        n = int(table.valid.sum())
        cost = math.nan
        if samples.factors is not None:
            factors = torch.where(table.valid, samples.factors, 0)
            factors = torch.where(table.forced & table.valid & (factors == 0), 1, factors)
            moment = self._moments if self._begun else math.nan
        else:
            factors, moment, cost = self._draw(table, None)
        total = float(table.norm.square().sum())
        noise = moment / total - 1 if total else 0.0
        kept = factors.nonzero().flatten()
        mine = factors[kept]
        if config.weight == "dg":
            mine = mine * torch.sigmoid(table.delight[kept])
        if config.normalize == "kept" and len(kept):
            mine = mine * (n / len(kept))
        self.forget()
        self.step += 1
        norm = samples.norm
        return Decision(
            delight,
            to_device(kept, delight.device),
            None if bool((mine == 1).all()) else to_device(mine.to(delight.dtype), delight.device),
            math.nan,
            len(kept) / n if n else math.nan,
            samples=n,
            sum_delight=float(table.delight[table.valid].sum()),
            sum_delight_kept=float(table.delight[kept].sum()),
            noise=max(noise, 0.0) if config.rule is None else math.nan,
            without_gradient=float((table.norm[table.valid] == 0).double().mean()) if norm is not None else math.nan,
            largest_factor=float(mine.max()) if len(mine) else 0.0,
            cost=cost,
        )

    def _table(self, samples: Samples, forced: Tensor | None) -> Table:
        if samples.factors is None and self.config.needs_norm:
            self._norm_of(samples)
        return Table.of(samples, forced, self.config)

    def _draw(self, table: Table, earlier: Tensor | None) -> Drawn:
        return draw(self.config, table, self.rate(), self.costs, self._generator, earlier)

    def most(self, expected: float) -> int | None:
        """The most of this many samples that a decision by rank keeps; None where it is not by rank."""
        config = self.config
        if config.price is not None or config.history or config.weighs or not (config.hard and config.deterministic):
            return None
        rate = self.rate()
        assert rate is not None
        return max(1, math.ceil(rate * expected + 0.5))

    def draw(self, signals: list[Signal]) -> None:
        """Draw from batches before the decision, where what comes later does not matter.

        Random rows get their scores. Where rows are drawn and weighed, what each backward of a window draws is fair for
        itself: how many is settled by what came before.
        """
        config = self.config
        if not signals:
            return
        if config.weighs and not config.asks:
            table = self._table(self.samples(signals), None)
            sizes = [earlier.sizes(config) for earlier in self._begun]
            factors, moment, _ = self._draw(table, torch.cat(sizes) if sizes else None)
            self._begun.append(table)
            self._moments += moment
            for signal, mine in zip(signals, self.split(factors, signals), strict=True):
                signal.factors = mine
        elif config.priority == "uniform" and config.hard and config.deterministic and not config.history:
            for signal in signals:
                n = signal.valid.numel() if config.tokens else len(signal.valid)
                signal.draws = self.uniform(n)

    def forget(self) -> None:
        """Take nothing into account of a window that will not be decided on."""
        self._begun, self._moments = [], 0.0

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
        kept, highest = ranked_first(ranked, max(1, round(rate * n), forced))
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
        self.forget()


def _first_of_each_row(valid: Tensor) -> Tensor:
    """(B * P,) bool, of the positions of (B, P) or (B,)."""
    begins = torch.zeros_like(valid).view(len(valid), -1)
    begins[:, 0] = True
    return begins.reshape(-1)
