"""The gradient of a policy-gradient loss at logits, in the form it has: one number and one action a position.

``g = c (softmax(y) - onehot(a))``, so ``c``, ``a`` and the log-prob of ``a`` stand for (T, K) values while a row waits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kondo_hooks.delight.loss_code import Picked

_LARGE = 2**18  # values of logits from which they go through in pieces
_PIECES = 4
_AT_ONCE = 2**26  # values of a piece at most
_ROUNDINGS = 16  # of a sum over the actions, beside those that grow with their number


@dataclass
class RankOne:
    """The gradient at n rows of logits.

    Attributes:
        coefficient: (n, P) ``c``.
        action: (n, P) ``a``.
        logp: (n, P) log-prob of ``a``, by which a replay is held against the screen.
        shape: of the logits that it stands for, (n, ..., K).
        dtype: of the gradient that it stands for.
        rest: (n, ..., K) what stands beside the form, where rows that have none are put behind others that have.
    """

    coefficient: Tensor
    action: Tensor
    logp: Tensor
    shape: torch.Size
    dtype: torch.dtype
    rest: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor, grad: Tensor, rows: Tensor) -> "RankOne | None":
        """The form of ``grad`` at some rows of ``logits``, both (B, ..., K); None unless it is exact to rounding.

        What is computed on the way would take many times the logits' memory, so large ones go through in pieces.
        """
        if logits.dim() < 2 or logits.shape[-1] < 2 or not len(rows):
            return None
        pieces = max(_PIECES, logits.numel() // _AT_ONCE) if logits.numel() > _LARGE else 1
        found, errors = [], []
        for index in rows.tensor_split(min(pieces, len(rows))):
            one, error = cls._of(logits.index_select(0, index), grad.index_select(0, index))
            found.append(one)
            errors.append(error)
        coefficient, action, logp = (torch.cat(parts) for parts in zip(*(one.tensors() for one in found), strict=True))
        shape = torch.Size((len(rows), *logits.shape[1:]))
        return cls(coefficient, action, logp, shape, grad.dtype) if _is_rounding(errors) else None

    @classmethod
    def _of(cls, logits: Tensor, grad: Tensor) -> tuple["RankOne", "_Error"]:
        y, g = _flat(logits), _flat(grad)
        every = y.log_softmax(-1)
        action = _actions(g, every)
        logp = every.gather(-1, action)
        coefficient = _coefficients(g, action, logp)
        found = cls(coefficient.squeeze(-1), action.squeeze(-1), logp.squeeze(-1), logits.shape, grad.dtype)
        return found, _Error.of(found.expand(y).sub_(g), g, coefficient, every, logp, grad.dtype)

    @classmethod
    def of_picked(cls, picked: Picked | None, grad: Tensor, rows: Tensor | None = None) -> "RankOne | None":
        """The form that ``grad`` (B, ..., K) has because the loss takes nothing but one log-prob a position.

        The loss code tells it, so nothing is computed from the logits. The gradient is held against it by its value at
        each action and by its sums, which a hook on the way would change.

        Args:
            picked: the log-probs, with what the loss sent to them; None if none were seen.
            grad: the gradient at all of the logits.
            rows: (n,) which of its rows; None for all.

        Returns:
            The form; None where it has another.
        """
        if picked is None or picked.sent is None or picked.index.shape[-1] != 1 or not 2 <= grad.dim() <= 3:
            return None
        tensors = [grad, picked.index, picked.values, picked.sent]
        mine, *picks = tensors if rows is None else [t.index_select(0, rows.to(t.device)) for t in tensors]
        exact, type_ = torch.float64 if grad.dtype == torch.float64 else torch.float32, torch.finfo(grad.dtype)
        shape, first = (len(mine), mine[0, ..., 0].numel()), picked.offset
        action, logp, sent = (t.new_zeros(shape) for t in picks)
        for full, t in zip((action, logp, sent), picks, strict=True):
            full[:, first : first + t[0].numel()] = t.reshape(len(t), -1)
        logp, sent, values = logp.to(exact), sent.to(exact), mine.reshape(*shape, -1)
        if sent.device != values.device:
            return None
        at, rest = values.gather(-1, action.unsqueeze(-1)).squeeze(-1).to(exact), torch.expm1(logp).neg_()
        size = torch.linalg.vector_norm(values, 1, -1, dtype=exact)
        apart = [at - sent * rest, values.sum(-1, dtype=exact), size - 2 * sent.abs() * rest]
        # Each value was rounded to its type once, or to nothing. A norm is a sum in 16 lanes, which rounds as it goes.
        actions = grad.shape[-1]
        roundings = 4 * type_.eps + (_ROUNDINGS + actions / 16) * torch.finfo(exact).eps
        allowed = roundings * sent.abs() + actions * type_.smallest_normal * type_.eps
        if not bool(torch.stack([(difference.abs() <= allowed).all() for difference in apart]).all()):
            return None
        return cls(sent.neg_(), action, logp, mine.shape, grad.dtype)

    def expand(self, logits: Tensor) -> Tensor:
        """The gradient at ``logits`` (n, P, K), in their type."""
        grad = torch.softmax(logits, -1)
        grad.scatter_add_(-1, self.action.unsqueeze(-1), grad.new_full((1,), -1.0).expand(*self.action.shape, 1))
        return grad.mul_(self.coefficient.unsqueeze(-1))

    def grad(self, logits: Tensor) -> Tensor:
        """The gradient at the replay's logits, in the shape and type that the loss sent."""
        grad = self.expand(_flat(logits.detach())).view(self.shape).to(self.dtype)
        return grad if self.rest is None else grad + self.rest

    def log_probs(self, logits: Tensor) -> Tensor:
        """(n, P) what the replay's logits make of the actions."""
        y = _flat(logits.detach())
        return (y.gather(-1, self.action.unsqueeze(-1)) - y.logsumexp(-1, keepdim=True)).squeeze(-1)

    def take(self, index: Tensor) -> "RankOne":
        """Some of its rows."""
        shape, index = torch.Size((len(index), *self.shape[1:])), index.to(self.action.device)
        coefficient, action, logp = (t.index_select(0, index) for t in self.tensors())
        return RankOne(coefficient, action, logp, shape, self.dtype)

    def tokens(self, index: Tensor, factors: Tensor) -> "RankOne":
        """Some entries of its rows (n, T), counted through all of them, as one row, each times a factor."""
        coefficient, action, logp = (t.reshape(-1)[index][None] for t in self.tensors())
        shape = torch.Size((1, len(index), self.shape[-1]))
        return RankOne(coefficient * factors.to(coefficient.dtype), action, logp, shape, self.dtype)

    def until(self, length: int) -> "RankOne":
        """Its first positions, on the first axis of a row."""
        shape = torch.Size((self.shape[0], length, *self.shape[2:]))
        per = shape[2:-1].numel()
        coefficient, action, logp = (t[:, : length * per] for t in self.tensors())
        return RankOne(coefficient, action, logp, shape, self.dtype)

    def weighted(self, factors: Tensor) -> "RankOne":
        """Each row times a factor, (n,), or each entry of its leading axes, (n, T, ...); not of the actions'."""
        inner = self.shape[1:-1]
        spread = factors.view(*factors.shape, *[1] * (1 + len(inner) - factors.dim())).expand(len(factors), *inner)
        coefficient = self.coefficient * spread.reshape(len(factors), -1).to(self.coefficient.dtype)
        return RankOne(coefficient, self.action, self.logp, self.shape, self.dtype)

    @classmethod
    def beside(cls, logits: Tensor, grad: Tensor) -> "RankOne":
        """A gradient (1, T, K) that has no such form, so that it can stand behind others: all of it is ``rest``."""
        logp = _flat(logits).log_softmax(-1)[..., 0]
        nothing = torch.zeros_like(logp)
        return cls(nothing, nothing.long(), logp, grad.shape, grad.dtype, grad)

    @classmethod
    def of_tokens(cls, logits: Tensor, grad: Tensor) -> "RankOne | None":
        """The form of a gradient at packed logits (B, T, K), token by token."""
        found = cls.of(logits.flatten(0, 1), grad.flatten(0, 1), torch.arange(grad[..., 0].numel(), device=grad.device))
        if found is None:
            return None
        coefficient, action, logp = (t.view(grad.shape[:2]) for t in found.tensors())
        return cls(coefficient, action, logp, grad.shape, grad.dtype)

    def tensors(self) -> list[Tensor]:
        """What it holds."""
        return [self.coefficient, self.action, self.logp]


def _actions(grad: Tensor, every: Tensor) -> Tensor:
    """(n, P, 1) the entries that stand alone in their sign: the largest or the smallest, which foretells the other."""
    ends = grad.argmax(-1, keepdim=True), grad.argmin(-1, keepdim=True)
    apart = [
        (_coefficients(grad, one, every.gather(-1, one)) * every.gather(-1, other).exp() - grad.gather(-1, other)).abs()
        for one, other in (ends, ends[::-1])
    ]
    return torch.where(apart[0] <= apart[1], *ends)


def _coefficients(grad: Tensor, action: Tensor, logp: Tensor) -> Tensor:
    g = grad.gather(-1, action)
    return torch.where(g != 0, g / torch.expm1(logp), 0)


@dataclass
class _Error:
    """What a form is beside a gradient.

    Attributes:
        small: () whether each value differs by no more than its rounding.
        along: (3,) sums of the differences along the directions that other terms of a loss would have.
        noise: (3,) the squares of what rounding leaves of these.
    """

    small: Tensor
    along: Tensor
    noise: Tensor

    @classmethod
    def of(
        cls, apart: Tensor, grad: Tensor, coefficient: Tensor, every: Tensor, logp: Tensor, dtype: torch.dtype
    ) -> "_Error":
        """From (n, P, K) differences."""
        eps, p = torch.finfo(dtype).eps, every.exp()
        # A coefficient is as uncertain as the difference of its log-prob from zero.
        unsure = 1 + 1 / torch.expm1(logp).abs().clamp_min(eps)
        allowed = 2 * eps * ((unsure + every.abs()) * p * coefficient.abs() + grad.abs())
        small = (apart.abs() <= allowed + torch.finfo(dtype).smallest_normal).all()
        sums, noises = [], []
        for direction in (torch.ones_like(p), p, p * every):
            along = (grad * direction).sum(-1, keepdim=True)
            sums.append((apart * direction).sum())
            noises.append(
                (eps * unsure * along).square().sum() + (eps * (1 + every.abs()) * grad * direction).square().sum()
            )
        return cls(small, torch.stack(sums), torch.stack(noises))


def _is_rounding(errors: list[_Error]) -> bool:
    """Whether the differences from a gradient are its type's rounding and nothing else.

    Another term (a z-loss, an entropy) may be less than the rounding of each value. Rounding has no direction; so the
    differences' sums along the directions of such terms are held against what rounding leaves of them.
    """
    along, noise = sum(error.along for error in errors), sum(error.noise for error in errors)
    assert isinstance(along, Tensor) and isinstance(noise, Tensor)
    small = torch.stack([error.small for error in errors]).all()
    return bool(small & (along.abs() <= 4 * noise.sqrt()).all())


def _flat(values: Tensor) -> Tensor:
    """(n, ..., K) as (n, P, K), in float32 or better."""
    values = values.reshape(len(values), -1, values.shape[-1])
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
