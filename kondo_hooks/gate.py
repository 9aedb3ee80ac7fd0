"""The Kondo gate as a module and as losses: the API of the PyPI package ``kondo-gate`` 0.1.0.

Its users migrate by changing the import. Some things differ, each where that package is wrong:

- top-k keeps exactly k samples, ties by index; its threshold keeps every tie, so a batch of equal
  delights is kept whole, and in float64 or bfloat16 the rounded threshold loses the sample that it is made of;
- a fixed price must be beaten: delight equal to the price is dropped (price 0 keeps delight > 0);
- ``KondoTrainer.step`` really skips: dropped rows never build a graph.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kondo_hooks.api import gated
from kondo_hooks.handle import Gated
from kondo_hooks.rules.draw import gate_probability, top_k


@dataclass
class KondoGateConfig:
    """Configuration of a KondoGate.

    Args:
        gate_rate: fraction of samples to keep, in (0, 1]; the price is the (1 - rate)-quantile of delight.
        price: fixed price in advantage x nats. Exactly one of ``gate_rate`` and ``price`` is set.
        temperature: softness of the stochastic and soft gates, > 0.
        hard: binary gate; False weights by ``sigmoid((delight - price) / temperature)``.
        deterministic: exact top-k; False draws a Bernoulli gate. Only with ``hard=True``.

    Examples:
        >>> import kondo_hooks as kondo
        >>> kondo.KondoGateConfig(gate_rate=None, price=0.0).hard
        True
    """

    gate_rate: float | None = 0.3
    price: float | None = None
    temperature: float = 0.1
    hard: bool = True
    deterministic: bool = True


@dataclass
class KondoGateOutput:
    """What a KondoGate decided.

    Attributes:
        gate_weights: gate of each sample or token, in the shape of the log-probs.
        gate_probs: ``sigmoid((delight - price) / temperature)``, same shape.
        delight: advantage x surprisal, same shape.
        price: the price used, a scalar tensor.
        actual_gate_rate: mean gate, a scalar tensor.
        gated_policy_loss: scalar loss, only from ``KondoGate.forward``.
        action_log_probs: log-probs of the actions taken, only from ``KondoGate.forward``.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> log_probs, advantages = torch.tensor([-0.5, -2.0, -1.0]), torch.ones(3)
        >>> kondo.KondoGate(kondo.KondoGateConfig(gate_rate=0.5)).compute_gate(log_probs, advantages).delight
        tensor([0.5000, 2.0000, 1.0000])
    """

    gate_weights: Tensor
    gate_probs: Tensor
    delight: Tensor
    price: Tensor
    actual_gate_rate: Tensor
    gated_policy_loss: Tensor | None = None
    action_log_probs: Tensor | None = None


class KondoGate(nn.Module):
    """Decides which samples' gradients count, from log-probs and advantages.

    The gate only weights the loss: to skip the dropped samples' work, use :func:`kondo_hooks.gated`.
    Random draws of the Bernoulli gate come from the gate's own generator, seeded with ``seed``.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> log_probs, advantages = torch.tensor([-0.5, -2.0, -1.0]), torch.ones(3)
        >>> gate = kondo.KondoGate(kondo.KondoGateConfig(gate_rate=None, price=0.8))
        >>> gate.compute_gate(log_probs, advantages).gate_weights
        tensor([0., 1., 1.])
    """

    def __init__(self, config: KondoGateConfig | None = None, *, seed: int = 0):
        super().__init__()
        self.config = config = config or KondoGateConfig()
        if config.gate_rate is not None and config.price is not None:
            raise ValueError("Specify either gate_rate or price, not both.")
        if config.gate_rate is None and config.price is None:
            raise ValueError("Specify gate_rate or price.")
        if config.gate_rate is not None and not 0 < config.gate_rate <= 1:
            raise ValueError(f"gate_rate must be in (0, 1], got {config.gate_rate}")
        if config.price is not None and not math.isfinite(config.price):
            raise ValueError(f"price must be finite, got {config.price}")
        if not config.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {config.temperature}")
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def compute_delight(self, log_probs: Tensor, advantages: Tensor) -> Tensor:
        """Advantage times surprisal, without graph; shape of ``log_probs``, (B,) or (B, T)."""
        if log_probs.shape != advantages.shape:
            raise ValueError(
                f"advantages have shape {tuple(advantages.shape)}, log_probs {tuple(log_probs.shape)}: "
                "give one advantage a log-prob"
            )
        return advantages.detach() * -log_probs.detach()

    def compute_gate(self, log_probs: Tensor, advantages: Tensor, delight: Tensor | None = None) -> KondoGateOutput:
        """Decide on (B,) or (B, T) samples; ``delight`` replaces advantage x surprisal when given.

        Raises:
            ValueError: on an empty batch, NaN or infinite delight, or shapes that do not match.
        """
        config = self.config
        if delight is None:
            delight = self.compute_delight(log_probs, advantages)
        if delight.numel() == 0:
            raise ValueError("the gate was given an empty batch: there is no sample to choose from")
        if not delight.isfinite().all():
            raise ValueError("delight is NaN or infinite: look for an infinite log-prob or advantage")
        flat = delight.detach().reshape(-1)
        if config.gate_rate is not None:
            price = torch.quantile(flat.float(), 1.0 - config.gate_rate)
        else:
            price = torch.tensor(config.price, device=delight.device, dtype=delight.dtype)
        probs = gate_probability(delight, price, config.temperature)
        if not config.hard:
            weights = probs
        elif not config.deterministic:
            draws = torch.rand(probs.shape, generator=self._generator, dtype=probs.dtype, device="cpu")
            weights = (draws.to(probs.device) < probs).to(probs.dtype)
        elif config.gate_rate is None:
            weights = (delight > price).float().detach()
        else:
            flat_weights = torch.zeros(len(flat), device=flat.device)
            flat_weights[top_k(flat, _samples_above_quantile(len(flat), config.gate_rate))] = 1
            weights = flat_weights.view_as(delight)
        return KondoGateOutput(weights, probs, delight, price, weights.detach().mean())

    def forward(
        self, logits: Tensor, actions: Tensor, advantages: Tensor, attention_mask: Tensor | None = None
    ) -> KondoGateOutput:
        """Log-probs, delight, gate and the gated loss ``-mean(gate * advantage * log pi(a))``.

        Args:
            logits: (B, V) or (B, T, V).
            actions: (B,) or (B, T) indices of the actions taken.
            advantages: shape of ``actions``.
            attention_mask: (B, T), 1 where a token counts. With it the gate decides on whole samples, by
                the product of their mean log-prob and mean advantage; without it, on single tokens.
        """
        if logits.dim() not in (2, 3):
            raise ValueError(f"logits must be (B, V) or (B, T, V), got {tuple(logits.shape)}")
        if logits.shape[:-1] != actions.shape or advantages.shape != actions.shape:
            raise ValueError(
                f"logits {tuple(logits.shape)}, actions {tuple(actions.shape)} and advantages "
                f"{tuple(advantages.shape)} do not fit: actions and advantages take logits' shape "
                "without its last axis"
            )
        logp = action_log_probs(logits, actions)
        if attention_mask is not None and logp.dim() == 2:
            mask = attention_mask.to(logp.dtype)
            length = mask.sum(-1).clamp(min=1)
            result = self.compute_gate((logp * mask).sum(-1) / length, (advantages * mask).sum(-1) / length)
            weighted = (result.gate_weights.unsqueeze(-1) * advantages * mask).detach()
            loss = -(logp * weighted).sum() / mask.sum().clamp(min=1)
        else:
            result = self.compute_gate(logp, advantages)
            loss = -(logp * (result.gate_weights * advantages).detach()).mean()
        result.gated_policy_loss = loss
        result.action_log_probs = logp
        return result


def _samples_above_quantile(n: int, rate: float) -> int:
    """How many of n distinct values are at or above their (1 - rate)-quantile."""
    return n - math.ceil((1.0 - rate) * (n - 1) - 1e-6)


def action_log_probs(logits: Tensor, actions: Tensor) -> Tensor:
    """``log pi(a)``: log-softmax of logits (..., V) gathered at actions (...), shape of ``actions``."""
    return F.log_softmax(logits, dim=-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def pg_loss(logits: Tensor, actions: Tensor, advantages: Tensor) -> Tensor:
    """REINFORCE: ``-mean(advantage * log pi(a))``; logits (..., V), actions and advantages (...).

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> logits, actions, advantages = torch.zeros(2, 4), torch.tensor([0, 3]), torch.ones(2)
        >>> kondo.pg_loss(logits, actions, advantages)  # log 4
        tensor(1.3863)
    """
    return -(action_log_probs(logits, actions) * advantages.detach()).mean()


def dg_loss(logits: Tensor, actions: Tensor, advantages: Tensor, eta: float = 1.0) -> tuple[Tensor, Tensor]:
    """Delightful policy gradient (arXiv 2603.14608): each sample weighted by ``sigmoid(delight / eta)``.

    Returns the scalar loss and the weights, which carry no graph.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> logits, actions, advantages = torch.zeros(2, 4), torch.tensor([0, 3]), torch.ones(2)
        >>> loss, weights = kondo.dg_loss(logits, actions, advantages)
        >>> weights
        tensor([0.8000, 0.8000])
    """
    logp = action_log_probs(logits, actions)
    weights = torch.sigmoid(advantages.detach() * -logp.detach() / eta)
    return -(logp * (weights * advantages).detach()).mean(), weights


def expected_confidence_baseline(probs: Tensor) -> Tensor:
    """The baseline ``b = sum_a pi(a)^2`` of the MNIST bandit; probs (..., A) to (...).

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> kondo.expected_confidence_baseline(torch.tensor([0.5, 0.5]))
        tensor(0.5000)
    """
    return (probs**2).sum(dim=-1)


class KondoTrainer:
    """A REINFORCE step on a causal language model, gated, that forwards only kept rows with a graph.

    Args:
        model: returns an object with ``logits`` of shape (B, T, V).
        gate_rate: fraction to keep; ignored when ``price`` is given.
        temperature, price, hard, deterministic: as in :class:`KondoGateConfig`.
        lr: of the Adam optimizer that is made when ``optimizer`` is None.
        optimizer: of the model's parameters.

    Examples:
        >>> import torch, kondo_hooks as kondo
        >>> from types import SimpleNamespace
        >>> class Model(torch.nn.Embedding):
        ...     def forward(self, input_ids, attention_mask=None):
        ...         return SimpleNamespace(logits=super().forward(input_ids))
        >>> ids, advantages = torch.randint(0, 9, (8, 5)), torch.randn(8, 1).expand(8, 5)
        >>> told = kondo.KondoTrainer(Model(9, 9), gate_rate=0.25).step(ids, ids, advantages, torch.ones(8, 5))
        >>> told["rows_forwarded"]
        2
    """

    def __init__(
        self,
        model: nn.Module,
        gate_rate: float = 0.3,
        temperature: float = 0.1,
        price: float | None = None,
        hard: bool = True,
        deterministic: bool = True,
        lr: float = 3e-4,
        optimizer: torch.optim.Optimizer | None = None,
    ):
        self.model = model
        self.gate = KondoGate(
            KondoGateConfig(gate_rate if price is None else None, price, temperature, hard, deterministic)
        )
        self.optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=lr)
        self._handle: Gated | None = None

    def step(
        self, input_ids: Tensor, actions: Tensor, advantages: Tensor, attention_mask: Tensor | None = None
    ) -> dict[str, float]:
        """One step. Returns ``loss``, ``gate_rate``, ``price``, ``mean_delight`` and ``rows_forwarded``.

        Args:
            input_ids, actions, advantages, attention_mask: (B, T).
        """
        self.model.train()
        self.optimizer.zero_grad()
        # KondoGate has already multiplied the dropped samples' loss by zero: what is left to
        # save is their rows' graph, so the context keeps every row that has a gradient.
        if self._handle is None:
            self._handle = gated(self.model, price=0.0, priority="abs_advantage")
        forwarded = self._handle.stats.forwarded
        with self._handle as handle:
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
            result = self.gate(logits, actions, advantages, attention_mask)
            result.gated_policy_loss.backward()
        self.optimizer.step()
        return {
            "loss": result.gated_policy_loss.item(),
            "gate_rate": result.actual_gate_rate.item(),
            "price": result.price.item(),
            "mean_delight": result.delight.mean().item(),
            "rows_forwarded": handle.stats.forwarded - forwarded if handle.enabled else len(input_ids),
        }
