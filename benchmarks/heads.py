"""What a step holds for the head of a language model: the plain loop, and the gated one, of three kinds of heads.

    python benchmarks/heads.py    # the table, a few seconds

A small Llama that is nearly all logits. "largest" is the largest tensor that was made at any time in the step, and
"peak" the most bytes that were held at once, beyond those before it; both in units of the logits of all rows, (rows x
T x V). The head outside returns logits to the loss code; TRL's returns log-probs, tile by tile, with a backward of its
own; the chunked one is plain PyTorch, some tokens at a time under a checkpoint.
"""

import csv
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import kondo_hooks as kondo

ROWS, TOKENS, WORDS, KEPT = 16, 64, 4096, 1 / 8
LOGITS = ROWS * TOKENS * WORDS * 4  # bytes


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside, while they live.

    Attributes:
        peak: most bytes at once.
        largest: bytes of the largest tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.largest = self._now = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return
        self._live.add(key)
        weakref.finalize(storage, self._gone, key, size)
        self._now += size
        self.peak, self.largest = max(self.peak, self._now), max(self.largest, size)

    def _gone(self, key: int, size: int) -> None:
        self._live.discard(key)
        self._now -= size


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes, initializer_range=0.1))


class Outside(nn.Module):
    """Logits leave the model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(ids, use_cache=False).logits}


class Trl(nn.Module):
    """TRL's fused head, in tiles of an eighth of the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        from trl.trainer import utils

        utils._CHUNKED_LOGPROB_CHUNK_SIZE = WORDS // 8
        self.model = llama()
        utils.add_fused_lm_head(self.model)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        return {"log_probs": self.model(ids, labels=ids, fused_lm_head=True).log_probs}


class Chunked(nn.Module):
    """The head in chunks of eight tokens, each under a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        hidden = self.model.model(ids, use_cache=False).last_hidden_state[:, :-1]
        pieces = zip(hidden.split(8, 1), ids[:, 1:].split(8, 1), strict=True)
        found = [checkpoint(self._log_probs, *piece, use_reentrant=False) for piece in pieces]
        return {"log_probs": torch.cat(found, 1)}

    def _log_probs(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return log_probs(self.model.lm_head(hidden), labels)


def log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)


HEADS: dict[str, type[nn.Module]] = {
    "logits outside": Outside,
    "TRL's fused head": Trl,
    "chunks, checkpointed": Chunked,
}


def step(model: nn.Module, ids: Tensor, u: Tensor) -> None:
    out = model(ids)
    logp = out["log_probs"] if "log_probs" in out else log_probs(out["logits"][:, :-1], ids[:, 1:])
    (-(u * logp).sum() / u.numel()).backward()
    model.zero_grad()


def measured(run: Callable[[], None]) -> Held:
    """The second step's: the first one finds out what it must know of the model."""
    run()
    with Held() as held:
        run()
    return held


def measure(kind: str) -> dict[str, Held]:
    """What a step of each loop holds."""
    g = torch.Generator().manual_seed(1)
    ids, u = torch.randint(WORDS, (ROWS, TOKENS), generator=g), torch.randn(ROWS, 1, generator=g)
    model = HEADS[kind]()
    found = {"plain": measured(lambda: step(model, ids, u))}
    with kondo.gated(model, rate=KEPT) as gate:
        found["gated"] = measured(lambda: step(model, ids, u))

        def first() -> None:
            gate.preselect(delight=u[:, 0])
            step(model, ids, u)

        found["screen-first"] = measured(first)
    assert gate.stats.kept < gate.stats.rows
    return found


def main() -> None:
    lines = []
    print(f"{ROWS} rows, T={TOKENS}, V={WORDS}; 1/8 kept{'':20}largest    peak   (in logits of all rows)")
    for kind in HEADS:
        for loop, held in measure(kind).items():
            lines.append([kind, loop, round(held.largest / LOGITS, 3), round(held.peak / LOGITS, 3)])
            print(f"  {kind:24}{loop:24}{lines[-1][2]:8.2f}{lines[-1][3]:8.2f}")
    path = Path(__file__).parent / "results" / "heads.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["head", "loop", "largest", "peak"], *lines])


if __name__ == "__main__":
    main()
