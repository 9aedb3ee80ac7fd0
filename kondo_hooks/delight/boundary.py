"""Delight read off the boundary: a call's outputs ``y`` and the loss gradient ``g = dL/dy`` there.

For a policy-gradient loss ``L = -s * sum_i U_i log pi_i`` the gradient at the log-prob is ``-s * U``, so
advantage (times the loss's own scale ``s``) and surprisal follow from ``(y, g)`` alone, except where two
actions make the gradient ambiguous. This is the last resort: log-probs that were told, returned by the
model or seen in the loss code come first (``watch.py``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kondo_hooks.errors import DelightError
from kondo_hooks.rules.samples import Signal

Kind = Literal["logits", "log_probs", "probs", "logp", "nll"]

_FIELDS: dict[str, Kind] = {
    "logits": "logits",
    "probs": "probs",
    **dict.fromkeys(
        ("log_probs", "logprobs", "log_prob", "logp", "logps", "per_token_logps", "action_log_probs"), "logp"
    ),
    **dict.fromkeys(("nll", "nlls", "per_token_nll", "token_nll"), "nll"),
}
_SAMPLE = 256


@dataclass
class Boundary:
    """One output of a call with rows first: values (B, ...), their gradient, what it was named as, which it is."""

    path: str
    values: Tensor
    grad: Tensor
    told: Kind | None = None
    index: int = 0

    @property
    def has_positions(self) -> bool:
        """Whether what is read here is one value for each position of its second axis, or for the row."""
        return self.values.dim() <= (2 if (self.told or self.field) in ("logp", "nll") else 3)

    @property
    def field(self) -> Kind | None:
        """What the output's own field name says it is."""
        return _FIELDS.get(self.path.rsplit(".", 1)[-1].rsplit("[", 1)[-1].strip("]'\""))

    def sums_to_zero(self) -> bool:
        """Whether the gradient sums to zero over the last axis: softmax does not see a shift of the logits."""
        if self.values.dim() < 2 or self.values.shape[-1] < 2:
            return False
        g = _sample(self.grad)
        tolerance = max(_tolerance(self.values), 1e-4)
        return bool((g.sum(-1).abs() <= tolerance * g.abs().sum(-1)).all()) and bool(self.grad.any())


def selected_outputs(outputs: list[Boundary]) -> list[Boundary]:
    """Outputs that are selected log-probs or nlls by name; empty if there is none."""
    return [out for out in outputs if (out.told or out.field) in ("logp", "nll") and not _is_normalised(out)]


def read_field(outputs: list[Boundary]) -> list[Signal]:
    """Signals of outputs that are selected log-probs or nlls by name; empty if there is none."""
    return [_read_selected(out, out.told or out.field) for out in selected_outputs(outputs)]


def read_terms(out: Boundary) -> Signal:
    """Signal of the terms that a model's own loss is a sum of: advantage x surprisal as they are, weights and all."""
    y, g = (t.reshape(len(t), -1) for t in (out.values, out.grad))
    y, g = (t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in (y, g))
    return Signal(g, y, g != 0)


def read_boundary(
    outputs: list[Boundary], is_selected: Callable[[], bool] = lambda: False
) -> tuple[list[Signal], float]:
    """Signals of the outputs that hold a policy, and the largest residual from a policy gradient.

    Arguments and errors are those of :func:`find_policy`.
    """
    return read_policy(find_policy(outputs, is_selected))


def find_policy(
    outputs: list[Boundary], is_selected: Callable[[], bool] = lambda: False
) -> list[tuple[Boundary, Kind]]:
    """The outputs that hold a policy, and as what.

    Args:
        outputs: those that the loss used.
        is_selected: whether the only output was picked from log-probs by the model.

    Raises:
        DelightError: if there is none.
    """
    told = [out for out in outputs if out.told]
    found: list[tuple[Boundary, Kind]] = []
    for out in told or outputs:
        kind = out.told or _recognise(out)
        if kind is not None:
            found.append((out, "log_probs" if kind == "logp" and _is_normalised(out) else kind))
    if not found and len(outputs) == 1 and (kind := _recognise_selected(outputs[0])) and is_selected():
        found.append((outputs[0], kind))
    if not found:
        described = ", ".join(f"{out.path or 'the output'} {tuple(out.values.shape)}" for out in outputs)
        raise DelightError(
            "gated: no policy was found in the loss or in the model's outputs "
            f"({described}), so delight is not known. Wrap the log-prob of the actions in gate.logp(...), "
            "or name the output that holds it with logp=, logits= or probs=. (A critic's loss alone has none: "
            "add it to the actor's and call backward once. Where there is no policy gradient at all, as in DQN, SAC, "
            "TD3 or a regression, use a rule that needs none: noise=0.5, or rate=... with priority='norm'.)"
        )
    return found


def read_policy(found: list[tuple[Boundary, Kind]]) -> tuple[list[Signal], float]:
    """Signals of outputs that hold a policy, and the largest residual from a policy gradient.

    Raises:
        DelightError: if two actions make it ambiguous.
    """
    signals, residuals = [], [0.0]
    for out, kind in found:
        if kind in ("logp", "nll"):
            signals.append(_read_selected(out, kind))
        else:
            signal, residual = _READERS[kind](out)
            signals.append(signal)
            residuals.append(residual)
    return signals, max(residuals)


def holds_policy(out: Boundary) -> bool:
    """Whether an output looks like a policy over actions, by its name, its values and its gradient."""
    return _recognise(out) is not None


def _is_normalised(out: Boundary) -> bool:
    values = _sample(out.values)
    if out.values.dim() < 2 or values.shape[-1] < 2:
        return False
    return bool((values.logsumexp(-1).abs() < _tolerance(out.values)).all())


def _sample(values: Tensor) -> Tensor:
    """Some positions (P, K) of (B, ..., K), in float32 or better."""
    flat = values.reshape(-1, values.shape[-1]) if values.dim() > 1 else values.reshape(-1, 1)
    flat = flat[:: max(1, len(flat) // _SAMPLE)]
    return flat if flat.dtype == torch.float64 else flat.float()


def _tolerance(values: Tensor) -> float:
    return max(4 * torch.finfo(values.dtype).eps ** 0.75, 1e-6)


def _recognise(out: Boundary) -> Kind | None:
    if out.field in ("logp", "nll"):
        return out.field
    if out.values.dim() < 2 or out.values.shape[-1] < 2:
        return None  # one logit: a value, or a Bernoulli policy, whose action is not told here
    if out.field is not None:
        return out.field
    # Normalised log-probs are logits too: a loss that takes their softmax again sends a logits' gradient.
    if out.sums_to_zero():
        return "logits"
    if _is_normalised(out):
        return "log_probs"
    y = _sample(out.values)
    if bool((y >= 0).all()) and bool(((y.sum(-1) - 1).abs() < _tolerance(out.values)).all()):
        return "probs"
    return None


def _recognise_selected(out: Boundary) -> Kind | None:
    """One value a position, all of one sign: log-probs or their negative."""
    if out.values.is_complex():
        return None
    if bool((out.values <= 0).all()):
        return "logp"
    return "nll" if bool((out.values >= 0).all()) else None


def _read_selected(out: Boundary, kind: Kind | None) -> Signal:
    sign = -1 if kind == "logp" else 1
    y, g = (_positions(t.unsqueeze(-1)).squeeze(-1) for t in (out.values, out.grad))
    return Signal(sign * g, sign * y, g != 0)


def _positions(values: Tensor) -> Tensor:
    """(B, ..., K) as (B, P, K), in float32 or better."""
    values = values.reshape(values.shape[0], -1, values.shape[-1])
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _read_logits(out: Boundary) -> tuple[Signal, float]:
    y, g = _positions(out.values), _positions(out.grad)
    high, low = g.max(-1), g.min(-1)
    gap = high.values + low.values
    action = torch.where(gap > 0, high.indices, low.indices)
    valid = (high.values > 0) | (low.values < 0)
    # The action's gradient is the largest, and alone in its sign. With nearly all of the rest of the mass on
    # one other action the two largest are equal to rounding, and only the sign of the others tells.
    tied = valid & (gap.abs() <= 1e-3 * high.values)
    if tied.any():
        positive, negative = (g[tied] > 0).sum(-1), (g[tied] < 0).sum(-1)
        if bool((positive == negative).any()):
            raise DelightError(
                "gated: with two actions the gradient at the logits does not tell which one was taken. Use "
                "the log-prob of the action in eager code (gather, cross_entropy, Categorical, Bernoulli), "
                "wrap it in gate.logp(...), or name the output that holds it with logp=."
            )
        action[tied] = torch.where(positive == 1, high.indices[tied], low.indices[tied])
    index = action.unsqueeze(-1)
    y_a = y.gather(-1, index).squeeze(-1)
    logp = y_a - y.logsumexp(-1)
    g_a = g.gather(-1, index).squeeze(-1)
    # 1 - pi_a without cancellation.
    advantages = torch.where(valid, g_a / torch.expm1(logp), 0)
    signal = Signal(advantages, -logp, valid)

    rows = _some(valid)
    expected = torch.softmax(y[rows], -1).scatter_add(-1, index[rows], -torch.ones_like(index[rows], dtype=y.dtype))
    return signal, _residual(g[rows], advantages[rows].unsqueeze(-1) * expected)


def _read_log_probs(out: Boundary) -> tuple[Signal, float]:
    y, g = _positions(out.values), _positions(out.grad)
    total, valid = g.sum(-1), g.ne(0).any(-1)
    surprisal = torch.where(total != 0, -(g * y.clamp_min(torch.finfo(y.dtype).min)).sum(-1) / total, 0)
    rows = _some(valid)
    action = g[rows].abs().argmax(-1, keepdim=True)
    expected = torch.zeros_like(g[rows]).scatter(-1, action, g[rows].gather(-1, action))
    return Signal(-total, surprisal, valid), _residual(g[rows], expected)


def _read_probs(out: Boundary) -> tuple[Signal, float]:
    p, g = _positions(out.values), _positions(out.grad)
    valid = g.ne(0).any(-1)
    # Renormalised probabilities give every action the same extra gradient: the median, off the action.
    if p.shape[-1] > 2:
        base = g.median(-1, keepdim=True).values
    elif bool((g.ne(0).sum(-1) > 1).any()):
        raise DelightError(
            "gated: with two actions the gradient at renormalised probabilities does not tell which one was "
            "taken. Wrap the log-prob of the action in gate.logp(...) or name its output with logp=."
        )
    else:
        base = torch.zeros_like(g[..., :1])
    action = (g - base).abs().argmax(-1, keepdim=True)
    g_a, p_a = g.gather(-1, action), p.gather(-1, action)
    advantages = torch.where(valid, (-(g_a - base) * p_a).squeeze(-1), 0)
    rows = _some(valid)
    expected = base[rows].expand_as(g[rows]).scatter(-1, action[rows], g_a[rows])
    return Signal(advantages, -p_a.log().squeeze(-1), valid), _residual(g[rows], expected)


_READERS = {"logits": _read_logits, "log_probs": _read_log_probs, "probs": _read_probs}


def _some(valid: Tensor) -> tuple[Tensor, ...]:
    """Index of a few valid positions."""
    found = valid.nonzero()
    return tuple(found[:: max(1, len(found) // _SAMPLE)].unbind(-1))


def _residual(actual: Tensor, expected: Tensor) -> float:
    apart, norm = (actual - expected).float().norm(), actual.float().norm()
    return float(apart / norm) if norm > 0 else 0.0
