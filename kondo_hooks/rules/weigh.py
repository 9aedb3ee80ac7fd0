"""Rules that give each sample a factor. One copy brings all that they look at to the host, and there they are exact."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kondo_hooks.rules.config import SelectionConfig
from kondo_hooks.rules.draw import (
    bounded_noise,
    cheapest,
    drawn_factors,
    drawn_prefixes,
    falling,
    fixed_share,
    inclusion,
    second_moment,
)
from kondo_hooks.rules.readback import to_device
from kondo_hooks.rules.samples import Rows, Samples, Signal, check_finite


class Costs(NamedTuple):
    """Seconds that steps were measured to take.

    Attributes:
        fixed: of a gated step that keeps nothing, a row.
        row: of one kept row.
    """

    fixed: float
    row: float


@dataclass
class Table:
    """The samples of a population on the host, in float64 and each of (N,).

    Attributes:
        delight: advantage x nats.
        size: by which a draw goes, at least zero.
        norm: of the gradients, or the size where these are not known.
        advantages: of each sample.
        valid: which are to be chosen from.
        forced: which are kept whatever they are.
        begins: which are the first position of a row, where rows are cut; the size never rises within one then.
    """

    delight: Tensor
    size: Tensor
    norm: Tensor
    advantages: Tensor
    valid: Tensor
    forced: Tensor
    begins: Tensor | None = None

    @classmethod
    def of(cls, samples: Samples, forced: Tensor | None, config: SelectionConfig) -> "Table":
        """Bring what is known of the samples to the host; raises ValueError where that is no number."""
        share = config.has_share
        every = {"delight": samples.delight, "norm": samples.norm, "advantages": samples.advantages}
        every |= {
            "begins": samples.begins,
            "valid": samples.valid,
            "forced": forced,
            "size": samples.scores if share else samples.norm,
        }
        if samples.rows is not None:
            rows = samples.rows
            seen = {"delight": rows.delight, "norm": rows.norm, "advantages": rows.advantage}
            size = samples.scores if share else rows.norm
            every = {**seen, "size": size, "forced": None if forced is None else forced.cpu()}
        given = to_host({name: value for name, value in every.items() if value is not None})
        n = len(samples.delight)
        size = given.get("size", torch.ones(n, dtype=torch.float64, device="cpu")).abs()
        nothing = torch.zeros(n, dtype=torch.float64, device="cpu")
        table = cls(
            given["delight"],
            size,
            given.get("norm", size),
            given.get("advantages", nothing),
            given["valid"] != 0 if "valid" in given else nothing == 0,
            given["forced"] != 0 if "forced" in given else nothing != 0,
        )
        table._clean()
        if "begins" in given:
            table.begins = given["begins"] != 0
            table.size = falling(table.size, table.begins)
        return table

    def sizes(self, config: SelectionConfig) -> Tensor:
        """(M,) of the samples that a draw's slope is found for.

        Where a row is cut, what comes before a position is run with it, whether it is valid or not.
        """
        return self.size if self.begins is not None and not config.has_share else self.size[self.valid]

    def _clean(self) -> None:
        masked = self.forced | ~self.valid
        for name in ("delight", "size", "norm", "advantages"):
            values = getattr(self, name)
            setattr(self, name, torch.where(masked & ~values.isfinite(), 0, values))
        check_finite(self.norm, self.delight)
        check_finite(self.size, self.delight)
        self.size = torch.where(self.valid, self.size, 0)
        self.norm = torch.where(self.valid, self.norm, 0)


class Drawn(NamedTuple):
    """What was drawn.

    Attributes:
        factors: (N,) on each sample's gradient, 0 where it is dropped.
        second_moment: ``sum n^2 / p``.
        cost: seconds times noise of a draw that went by both, a sample and in units of ``sum n^2``; else NaN.
    """

    factors: Tensor
    second_moment: float
    cost: float = math.nan


def draw(
    config: SelectionConfig,
    table: Table,
    rate: float | None,
    costs: Costs | None,
    generator: torch.Generator,
    earlier: Tensor | None = None,
) -> Drawn:
    """Draw samples, or keep all that have a gradient.

    Args:
        config: what was asked.
        table: the samples.
        rate: the share of them, where a draw is of a share.
        costs: as measured, if they were.
        generator: to draw from.
        earlier: sizes of the valid samples of the same population that were drawn from already.
    """
    sizes = table.sizes(config)
    sizes = sizes if earlier is None else torch.cat([earlier, sizes])
    cost = math.nan
    if config.is_lossless:
        c = math.inf
    elif config.noise is not None:
        c = bounded_noise(sizes, config.noise)
    elif rate is not None:
        c = fixed_share(sizes, max(1.0, rate * len(sizes)))
    else:
        # Until it was measured: a screen takes a third of a step's seconds.
        fixed, row = costs or Costs(0.5, 1.0)
        c, cost = cheapest(sizes, fixed * len(sizes), row)
        cost = math.nan if costs is None else cost / len(sizes)
    p = inclusion(table.size, c).masked_fill(table.forced & table.valid, 1.0)
    if table.begins is None:
        factors = drawn_factors(p, table.advantages, generator)
    else:
        factors = torch.where(table.valid, drawn_prefixes(p, table.begins, table.advantages, generator), 0)
    return Drawn(factors, second_moment(table.norm, p), cost)


def to_host(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one shape on the host, in float64; one wait brings all of them."""
    each = list(values.values())
    device = next((t.device for t in each if t.device.type != "cpu"), each[0].device)
    wide = _wide(each, device)
    stacked = torch.stack([to_device(t, device).to(wide) for t in each]).cpu().double()
    return dict(zip(values, stacked, strict=True))


def _wide(tensors: list[Tensor], device: torch.device) -> torch.dtype:
    """A type that loses nothing of these."""
    if device.type == "mps":
        return torch.float32
    return functools.reduce(torch.promote_types, [t.dtype for t in tensors if t.is_floating_point()], torch.float32)


def ask(function: Callable[[Rows], Any], rows: Rows, name: str) -> Tensor:
    """(N,) float64 what a function of the user's says of the rows; raises ValueError unless it is a number for each."""
    told = getattr(function, "__name__", type(function).__name__)
    found = function(rows)
    try:
        values = found if isinstance(found, Tensor) else torch.as_tensor(found, device="cpu")
        values = values.detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}={told}: returned {type(found).__name__}, not a number for each sample") from error
    if values.shape != (len(rows),):
        raise ValueError(
            f"{name}={told}: returned shape {tuple(values.shape)} for {len(rows)} samples: one number each"
        )
    if not values.isfinite().all():
        raise ValueError(f"{name}={told}: returned NaN or infinity for {int((~values.isfinite()).sum())} samples")
    return values


def rows_of(
    signals: list[Signal],
    samples: Samples,
    tokens: bool,
    groups: int | Tensor | None,
    step: int,
    generator: torch.Generator,
    pooled: bool,
) -> Rows:
    """What a rule of the user's is asked about.

    Args:
        signals: of the calls; not looked at where ``pooled``.
        samples: of the same.
        tokens: the samples are positions.
        groups: as the user told them.
        step: number of the decision.
        generator: to draw from.
        pooled: only what ``samples`` has is known: the rows are those of several ranks.
    """
    device = samples.delight.device
    nothing = torch.zeros_like(samples.delight)
    norm = nothing if samples.norm is None else samples.norm.to(device)
    if tokens or pooled:
        advantages, surprisal = (
            (nothing if t is None else t.to(device))[:, None] for t in (samples.advantages, samples.surprisal)
        )
        valid = (torch.ones_like(nothing) if samples.valid is None else samples.valid.to(device))[:, None]
    else:
        longest = max(s.valid.reshape(len(s.valid), -1).shape[1] for s in signals)
        advantages, surprisal, valid = (
            torch.cat([_padded(getattr(s, name).to(device), longest) for s in signals])
            for name in ("advantages", "surprisal", "valid")
        )
    p = advantages.shape[1]
    parts = [advantages, surprisal, valid, samples.delight[:, None], norm[:, None]]
    wide = _wide(parts, device)
    host = torch.cat([part.to(wide) for part in parts], 1).cpu().double()
    dtype = samples.delight.dtype
    rows = Rows(
        host[:, :p].to(dtype),
        host[:, p : 2 * p].to(dtype),
        host[:, 2 * p : 3 * p] != 0,
        host[:, -2].to(dtype),
        host[:, -1].to(dtype),
        None,
        step,
        generator,
    )
    rows.groups = _groups(groups, len(rows))
    if tokens:
        index = rows.valid[:, 0].nonzero().flatten()
        for name in ("advantages", "surprisal", "valid", "delight", "norm"):
            setattr(rows, name, getattr(rows, name)[index])
    return rows


def _padded(values: Tensor, length: int) -> Tensor:
    values = values.reshape(len(values), -1)
    return torch.nn.functional.pad(values, (0, length - values.shape[1])) if values.shape[1] < length else values


def _groups(groups: int | Tensor | None, n: int) -> Tensor | None:
    if groups is None:
        return None
    if isinstance(groups, int):
        if n % groups:
            raise ValueError(f"groups={groups}: {n} samples are no whole number of groups")
        return torch.arange(n, device="cpu") // groups
    if groups.shape != (n,):
        raise ValueError(f"groups: told for {tuple(groups.shape)} samples, and the population has {n}")
    return groups.cpu()
