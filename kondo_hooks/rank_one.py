"""The gradient of a policy-gradient loss at logits, in the form it has: one number and one action a position.

``g = c (softmax(y) - onehot(a))``, so ``c``, ``a`` and the log-prob of ``a`` stand for (T, K) values while a row waits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RankOne:
    """The gradient at n rows of logits.

    Attributes:
        coefficient: (n, P) ``c``.
        action: (n, P) ``a``.
        logp: (n, P) log-prob of ``a``, by which a replay is held against the screen.
        shape: of the logits that it stands for, (n, ..., K).
        dtype: of the gradient that it stands for.
    """

    coefficient: Tensor
    action: Tensor
    logp: Tensor
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, logits: Tensor, grad: Tensor) -> "RankOne | None":
        """The form of ``grad`` at ``logits``, both (n, ..., K); None unless it is exact to rounding."""
        if logits.dim() < 2 or logits.shape[-1] < 2 or not len(logits):
            return None
        y, g = _flat(logits), _flat(grad)
        action = g.abs().argmax(-1, keepdim=True)
        logp = (y.gather(-1, action) - y.logsumexp(-1, keepdim=True)).squeeze(-1)
        g_a = g.gather(-1, action).squeeze(-1)
        coefficient = torch.where(g_a != 0, g_a / torch.expm1(logp), 0)
        found = cls(coefficient, action.squeeze(-1), logp, logits.shape, grad.dtype)
        largest = float(g.abs().max())
        residual = float((found.expand(y) - g).abs().max())
        return found if residual <= 16 * torch.finfo(grad.dtype).eps * largest else None

    def expand(self, logits: Tensor) -> Tensor:
        """The gradient at ``logits`` (n, P, K), in their type."""
        grad = torch.softmax(logits, -1)
        grad.scatter_add_(-1, self.action.unsqueeze(-1), grad.new_full((1,), -1.0).expand(*self.action.shape, 1))
        return grad.mul_(self.coefficient.unsqueeze(-1))

    def grad(self, logits: Tensor) -> Tensor:
        """The gradient at the replay's logits, in the shape and type that the loss sent."""
        return self.expand(_flat(logits.detach())).view(self.shape).to(self.dtype)

    def log_probs(self, logits: Tensor) -> Tensor:
        """(n, P) what the replay's logits make of the actions."""
        y = _flat(logits.detach())
        return (y.gather(-1, self.action.unsqueeze(-1)) - y.logsumexp(-1, keepdim=True)).squeeze(-1)

    def take(self, index: Tensor) -> "RankOne":
        """Some of its rows."""
        shape, index = torch.Size((len(index), *self.shape[1:])), index.to(self.action.device)
        coefficient, action, logp = (t.index_select(0, index) for t in self.tensors())
        return RankOne(coefficient, action, logp, shape, self.dtype)

    def weighted(self, factors: Tensor) -> "RankOne":
        """Each row times a factor, (n,), or each entry of its leading axes, (n, T, ...); not of the actions'."""
        inner = self.shape[1:-1]
        spread = factors.view(*factors.shape, *[1] * (1 + len(inner) - factors.dim())).expand(len(factors), *inner)
        coefficient = self.coefficient * spread.reshape(len(factors), -1).to(self.coefficient.dtype)
        return RankOne(coefficient, self.action, self.logp, self.shape, self.dtype)

    def tensors(self) -> list[Tensor]:
        """What it holds."""
        return [self.coefficient, self.action, self.logp]


def _flat(values: Tensor) -> Tensor:
    """(n, ..., K) as (n, P, K), in float32 or better."""
    values = values.reshape(len(values), -1, values.shape[-1])
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
