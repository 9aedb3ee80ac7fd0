"""The slow, obvious reference: full forward, dropped rows' terms times zero, full backward."""

import copy
import math
import warnings

import torch
from torch import Tensor, nn


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def largest_relative_difference(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> float:
    """Over parameters, relative to the largest gradient of each tensor. None and zero are told apart.

    Where a gradient vanishes in exact arithmetic (the bias of attention's keys) what is left is rounding of the
    others: a tensor's scale is at least 1e-4 of the model's.
    """
    worst = 0.0
    assert ours.keys() == theirs.keys()
    floor = 1e-4 * max((g.abs().max().item() for g in theirs.values() if g is not None), default=0.0)
    for name in ours:
        a, b = ours[name], theirs[name]
        assert (a is None) == (b is None), f"{name}: gradient is None in one of the two"
        if a is not None:
            scale = max(b.abs().max().item(), floor, 1e-30)
            worst = max(worst, (a - b).abs().max().item() / scale)
    return worst


def copies(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return copy.deepcopy(model), copy.deepcopy(model)


def kept_mask(kept: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(n, dtype=dtype)
    mask[kept] = 1
    return mask


TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


class Runs:
    """How large each run with a graph was, as the embedding of a vocabulary sees it.

    Attributes:
        shapes: of the ids of each run.
    """

    def __init__(self, model: nn.Module, vocabulary: int):
        self.shapes: list[tuple[int, ...]] = []
        embeddings = (m for m in model.modules() if isinstance(m, nn.Embedding))
        warnings.filterwarnings("ignore", message=".*forward hooks.*")
        next(m for m in embeddings if m.num_embeddings == vocabulary).register_forward_hook(self._note)

    def _note(self, _module: nn.Module, given: tuple[Tensor, ...], _output: Tensor) -> None:
        if torch.is_grad_enabled():
            self.shapes.append(tuple(given[0].shape))

    @property
    def tokens(self) -> list[int]:
        """Of each run, rows times positions."""
        return [math.prod(shape) for shape in self.shapes]


def told(options: dict) -> str:
    """Options as a test's name."""
    return ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in options.items())
