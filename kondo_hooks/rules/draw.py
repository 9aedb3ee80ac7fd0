"""How many rows, and which: pure tensor maths."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest of (N,) scores, ascending; ties go to the lower index."""
    return ranked_first(scores, k)[0]


def ranked_first(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
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


_NEARLY = 1e-9  # so near to one, it is certain

# Draws in proportion to a magnitude: row i is kept with p_i = min(1, c n_i), and weighs 1 / p_i.


class _Sorted(NamedTuple):
    """Magnitudes above zero, (M,) in descending order, and sums with the first m of them apart, m = 0 to M.

    Attributes:
        values: the magnitudes, relative to the largest.
        scale: the largest.
        head: (M + 1,) sum of the squares of the first m.
        tail: (M + 1,) sum of the others.
        rest: (M + 1,) sum of the squares of the others.
    """

    values: Tensor
    scale: float
    head: Tensor
    tail: Tensor
    rest: Tensor

    @classmethod
    def of(cls, magnitudes: Tensor) -> "_Sorted":
        values = magnitudes[magnitudes > 0].double().sort(descending=True).values
        scale = float(values[0]) if len(values) else 1.0
        values = values / scale
        zero = values.new_zeros(1)
        head = torch.cat([zero, values.square().cumsum(0)])
        tail, rest = (torch.cat([t.flip(0).cumsum(0).flip(0), zero]) for t in (values, values.square()))
        return cls(values, scale, head, tail, rest)

    def first(self, slopes: Tensor) -> float:
        """The slope for the fewest rows that are certain: ``slopes[m] * values[m] <= 1`` at the first such m."""
        unclipped = (slopes * self.values <= 1).nonzero()
        return float(slopes[unclipped[0]]) / self.scale if len(unclipped) else math.inf


def bounded_noise(magnitudes: Tensor, noise: float) -> float:
    """The smallest c with ``sum n^2 / p <= (1 + noise) sum n^2``: the fewest rows for a noise of at most that.

    Args:
        magnitudes: (N,) ``n``, at least zero.
        noise: of the draw, relative to ``sum n^2``.

    Returns:
        c; infinity where every row that is not zero is needed.
    """
    if noise == 0:
        return math.inf
    x = _Sorted.of(magnitudes)
    allowed = noise * x.head[-1] + x.rest[:-1]
    return x.first(x.tail[:-1] / allowed)


def fixed_share(magnitudes: Tensor, rows: float) -> float:
    """The c with ``sum p = rows``, or infinity where no more than so many rows are above zero."""
    x = _Sorted.of(magnitudes)
    if rows >= len(x.values):
        return math.inf
    certain = torch.arange(len(x.values), dtype=torch.float64, device="cpu")
    return x.first((rows - certain).clamp_min(0) / x.tail[:-1])


def cheapest(magnitudes: Tensor, fixed: float, row: float) -> tuple[float, float]:
    """The c that minimises seconds times noise, ``(fixed + row * sum p) * sum n^2 / p``.

    Args:
        magnitudes: (N,) ``n``, at least zero.
        fixed: seconds of a step that keeps nothing.
        row: seconds of one kept row.

    Returns:
        c, and that product in units of ``sum n^2``: what a step of all rows is worth if it takes fewer seconds.
    """
    x = _Sorted.of(magnitudes)
    if not len(x.values):
        return math.inf, fixed
    none, every = x.values.new_zeros(1), x.values.new_full((1,), math.inf)
    # With the first m rows certain, c lies between the two at which row m and row m + 1 become so.
    low, high = torch.cat([none, 1 / x.values]), torch.cat([1 / x.values, every])
    cost = fixed + row * torch.arange(len(low), dtype=torch.float64, device="cpu")
    best = (cost / (row * x.head)).sqrt().nan_to_num(math.inf)
    c = torch.minimum(torch.maximum(best, low), high)
    c[-1] = low[-1]  # all rows are certain
    product = (cost + row * c * x.tail) * (x.head + x.tail / c)
    m = int(product.argmin())
    everything = m == len(x.values)
    return (math.inf if everything else float(c[m]) / x.scale), float(product[m] / x.head[-1])


def inclusion(magnitudes: Tensor, c: float) -> Tensor:
    """(N,) ``p = min(1, c n)``, float64; what is zero is never kept."""
    if math.isinf(c):
        return (magnitudes > 0).double()
    p = magnitudes.double() * c
    return torch.where(p > 1 - _NEARLY, 1.0, p)


def second_moment(magnitudes: Tensor, probability: Tensor) -> float:
    """``sum n^2 / p`` of a draw, over what may be kept."""
    return float((magnitudes.square() / probability)[probability > 0].sum())


def drawn_factors(probability: Tensor, order: Tensor, generator: torch.Generator) -> Tensor:
    """(N,) ``1 / p`` of the rows of a systematic draw, 0 of the others; arguments as of ``systematic``."""
    start = float(torch.rand((), dtype=torch.float64, generator=generator, device="cpu"))
    kept = systematic(probability, order, start)
    return torch.where(kept, 1 / probability.clamp_min(torch.finfo(probability.dtype).tiny), 0)


def systematic(probability: Tensor, order: Tensor, start: float) -> Tensor:
    """(N,) bool: a systematic draw, in which rows that are near each other in ``order`` stand in for one another.

    Their number differs by less than one from the sum of the probabilities.

    Args:
        probability: (N,) of each row, float64.
        order: (N,) by which rows are put in line.
        start: in [0, 1), drawn uniformly.
    """
    kept = probability >= 1
    drawn = ((probability > 0) & ~kept).nonzero().flatten()
    line = drawn[order[drawn].sort(stable=True).indices]
    marks = (probability[line].cumsum(0) + start).floor()
    kept[line] = marks.diff(prepend=marks.new_zeros(1)) > 0
    return kept


# Draws that take the first so many positions of each row: a row that is run to some position has run all before it.

_GOLDEN = (5**0.5 - 1) / 2


def falling(sizes: Tensor, begins: Tensor) -> Tensor:
    """(N,) sizes that never rise within a row, for which a draw of its first positions costs least.

    Of all ``p`` that do not rise, ``min(1, c m)`` has the least ``sum p`` for its ``sum n^2 / p`` if ``m^2`` is the
    mean of ``n^2`` over blocks of positions, as wide as it takes for these means to fall: the slopes of the least
    concave curve above the sum of ``n^2``.

    Args:
        sizes: (N,) ``n``, at least zero, the positions of one row after another, float64.
        begins: (N,) bool, the first position of each row.
    """
    scale = sizes.max().clamp_min(torch.finfo(sizes.dtype).tiny) if len(sizes) else 1.0
    row = begins.long().cumsum(0) - 1
    sums, counts, rows = (sizes / scale).square(), torch.ones_like(sizes), row
    block = torch.arange(len(sizes), device="cpu")
    while len(sums) > 1:
        # Neighbours that rise are in one block in the end, so whole runs of them may be put together at once.
        means = sums / counts
        apart = (rows.diff() != 0) | (means[1:] <= means[:-1])
        if bool(apart.all()):
            break
        into = torch.cat([apart.new_zeros(1), apart]).long().cumsum(0)
        n = int(into[-1]) + 1
        sums, counts = (sums.new_zeros(n).index_add(0, into, t) for t in (sums, counts))
        rows = rows.new_zeros(n).index_put((into,), rows)
        block = into[block]
    return (sums / counts).sqrt()[block] * scale


def drawn_prefixes(probability: Tensor, begins: Tensor, order: Tensor, generator: torch.Generator) -> Tensor:
    """(N,) ``1 / p`` of the positions that are drawn, 0 of the others: in each row the first so many.

    One number a row decides, and those of rows that are near each other are far apart.

    Args:
        probability: (N,) of each position, float64, which never rises within a row.
        begins: (N,) bool, the first position of each row.
        order: (N,) by which rows are put in line.
        generator: to draw from.
    """
    start = float(torch.rand((), dtype=torch.float64, generator=generator, device="cpu"))
    row, place, shape = _places(begins)
    by = order.new_zeros(shape)
    by[row, place] = order
    line = by.mean(1).argsort(stable=True)
    level = torch.empty(shape[0], dtype=torch.float64, device="cpu")
    level[line] = (start + _GOLDEN * torch.arange(shape[0], dtype=torch.float64, device="cpu")) % 1
    return torch.where(level[row] < probability, 1 / probability.clamp_min(torch.finfo(probability.dtype).tiny), 0)


def _places(begins: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """The row of each position and its place in it, and the shape of a table that holds all of them."""
    row = begins.long().cumsum(0) - 1
    starts = begins.nonzero().flatten()
    place = torch.arange(len(begins), device=begins.device) - starts[row]
    return row, place, (len(starts), int(place.max()) + 1 if len(place) else 0)
