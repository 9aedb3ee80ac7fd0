"""Rules that others have published, as functions of the rows: ``kondo.gated(model, rule=kondo.rules.cppo(0.25))``.

Each is a few lines, and a rule of one's own is no more: a function of :class:`kondo_hooks.Rows` that returns a factor
for each row, 0 to drop it. ``docs/rules.md`` says when which is of use. Those marked unbiased keep the expectation of
the gradient; the others change what is learned.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kondo_hooks.rules.config import check_rate
from kondo_hooks.rules.draw import bounded_noise, drawn_factors, inclusion, top_k
from kondo_hooks.rules.samples import Rows

Rule = Callable[[Rows], Tensor]


def cppo(rate: float) -> Rule:
    """The rows of the largest absolute advantage within each group (CPPO, Lin et al. 2025, arXiv 2503.22342). Biased.

    Args:
        rate: of each group, at least one row.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
        >>> def loss(logits):
        ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
        >>> with kondo.gated(model, rule=kondo.rules.cppo(0.25), groups=4) as gate:
        ...     loss(model(obs)).backward()
        >>> gate.stats.kept
        5
    """
    check_rate(rate)

    def keep(rows: Rows) -> Tensor:
        return _flags(rows, lambda index: top_k(rows.advantage[index].abs(), _share(rate, index)), "cppo")

    return keep


def pods(rate: float) -> Rule:
    """The rows whose rewards have the greatest variance within each group (PODS, Xu et al. 2025, arXiv 2504.13818).

    They are the lowest and the highest, of which some cut is the best. The reward is read off the advantage, which
    within a group orders rows as the reward does and spaces them alike. Biased.

    Args:
        rate: of each group, at least one row.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
        >>> def loss(logits):
        ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
        >>> with kondo.gated(model, rule=kondo.rules.pods(0.5), groups=4) as gate:
        ...     loss(model(obs)).backward()
        >>> gate.stats.kept
        10
    """
    check_rate(rate)

    def extremes(values: Tensor, k: int) -> Tensor:
        order = values.sort(stable=True).indices
        low_and_high = [torch.cat([order[:i], order[len(order) - (k - i) :]]) for i in range(k + 1)]
        return max(low_and_high, key=lambda index: float(values[index].var(correction=0)))

    def keep(rows: Rows) -> Tensor:
        return _flags(rows, lambda index: extremes(rows.advantage[index].double(), _share(rate, index)), "pods")

    return keep


def positive(noise: float = 0.5) -> Rule:
    """Rows of positive advantage alone, drawn by the norm of their gradients and weighed.

    Another objective: it learns from success and not from failure, fast at first; in long runs it falls behind, and
    answers lose their variety (2506.01347 reports it of pass@k). Biased against the loss as it is written.

    Args:
        noise: of the draw among them.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
        >>> def loss(logits):
        ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
        >>> with kondo.gated(model, rule=kondo.rules.positive(0.5)) as gate:
        ...     loss(model(obs)).backward()
        >>> bool((u[gate.last.kept] > 0).all())
        True
    """
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be a number >= 0, got {noise!r}")

    def draw(rows: Rows) -> Tensor:
        norm = torch.where(rows.advantage > 0, rows.norm.double(), 0)
        p = inclusion(norm, bounded_noise(norm, noise))
        return drawn_factors(p, rows.advantage, rows.generator)

    return draw


def random(rate: float) -> Rule:
    """Random rows, weighed for the others: the control that a rule has to beat. Unbiased.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
        >>> def loss(logits):
        ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
        >>> with kondo.gated(model, rule=kondo.rules.random(0.25)) as gate:
        ...     loss(model(obs)).backward()
        >>> gate.stats.kept
        5
    """
    check_rate(rate)

    def draw(rows: Rows) -> Tensor:
        k = max(1, round(rate * len(rows)))
        scores = torch.rand(len(rows), generator=rows.generator, device="cpu")
        factors = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
        factors[top_k(scores, k)] = len(rows) / k
        return factors

    draw.unbiased, draw.needs_policy = True, False  # type: ignore[attr-defined]
    return draw


def surprising(rate: float) -> Rule:
    """The samples of the highest surprisal, as the 20% of high-entropy tokens of Wang et al. 2025, arXiv 2506.01939.

    With ``unit="token"``, the tokens at which the policy was least sure; what was published goes by the entropy, of
    which a sampled token's surprisal is an estimate from one draw. A row is replayed whole if one token of it is kept,
    so it saves something only where whole rows hold none. Biased.

    Args:
        rate: of all samples.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 4)
        >>> obs, actions, u = torch.randn(20, 8), torch.randint(0, 4, (20,)), torch.randn(20)
        >>> def loss(logits):
        ...     return -(logits.log_softmax(-1)[torch.arange(20), actions] * u).mean()
        >>> with kondo.gated(model, rule=kondo.rules.surprising(0.2)) as gate:
        ...     loss(model(obs)).backward()
        >>> gate.stats.kept
        4
    """
    check_rate(rate)

    def keep(rows: Rows) -> Tensor:
        flags = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
        surprisal = torch.where(rows.valid, rows.surprisal, 0).sum(1)
        flags[top_k(surprisal, max(1, round(rate * len(rows))))] = 1
        return flags

    return keep


def _share(rate: float, index: Tensor) -> int:
    return max(1, round(rate * len(index)))


def _groups(rows: Rows, name: str) -> Iterator[Tensor]:
    if rows.groups is None:
        raise ValueError(
            f"kondo.rules.{name} compares the answers to one prompt: say which they are, by gated(..., groups=8) where "
            "eight rows follow each other, or by gate.groups(ids)"
        )
    for group in rows.groups.unique():
        yield (rows.groups == group).nonzero().flatten()


def _flags(rows: Rows, best: Callable[[Tensor], Tensor], name: str) -> Tensor:
    """(N,) one for the best of each group, by their position in it."""
    flags = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
    for index in _groups(rows, name):
        flags[index[best(index)]] = 1
    return flags
