"""Packed rows: what a gated step of texts that follow each other in a row costs, beside padded rows and the floor.

    python benchmarks/packed.py    # Llama-like models of two sizes on the CPU, about six minutes of 2 cores

32 texts of 16 to 128 tokens, in 4 packs of 8 or in 32 padded rows, one update for all of them; 1 in 32 and 1 in 8 are
kept, by delight. "floor" is what no gate can go below: a forward of all packs without a graph, and one short pack of
the kept texts forward and backward, with the loss code's own work. Variants take turns; medians over rounds.
"""

import argparse
import contextlib
import csv
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step import Llama
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import kondo_hooks as kondo

TEXTS, PACKS, VOCABULARY = 32, 4, 2000
SIZES = {
    "small": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8},
    "larger": {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 10, "num_attention_heads": 10},
}


class Batch:
    """Texts with an advantage each, as packs and as padded rows."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.lengths = torch.randint(16, 129, (TEXTS,), generator=g)
        self.ids = [torch.randint(VOCABULARY, (int(n),), generator=g) for n in self.lengths]
        self.u = torch.randn(TEXTS, generator=g)
        each = TEXTS // PACKS
        self.packs = [range(i * each, (i + 1) * each) for i in range(PACKS)]

    def pack(self, texts: range | list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and positions (1, total), and for each token the advantage of its text, 0 where it predicts another's."""
        ids = torch.cat([self.ids[i] for i in texts])[None]
        places = torch.cat([torch.arange(int(self.lengths[i])) for i in texts])[None]
        u = torch.cat([self.u[i].expand(int(self.lengths[i])) for i in texts])[None]
        return ids, places, torch.where(F.pad(places[:, 1:], (0, 1)) == 0, 0.0, u)

    def padded(self) -> tuple[Tensor, Tensor]:
        """Ids (TEXTS, longest) and each token's advantage."""
        ids = nn.utils.rnn.pad_sequence(self.ids, batch_first=True)
        real = torch.arange(ids.shape[1]) < self.lengths[:, None] - 1
        return ids, torch.where(real, self.u[:, None], 0.0)


def policy_loss(logits: Tensor, ids: Tensor, u: Tensor) -> Tensor:
    logp = logits.log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None]).squeeze(-1)
    return -(u * logp).sum() / TEXTS


def variants(model: nn.Module, batch: Batch) -> dict[str, tuple[contextlib.AbstractContextManager, Callable[[], None]]]:
    """A context that a loop would hold open, and a step, by name."""
    packs, (ids, u) = [batch.pack(texts) for texts in batch.packs], batch.padded()

    def run(ids: Tensor, places: Tensor) -> Tensor:
        return model(input_ids=ids, position_ids=places, use_cache=False).logits

    def packed() -> None:
        for ids, places, u in packs:
            policy_loss(run(ids, places), ids, u).backward()

    def padded() -> None:
        policy_loss(model(input_ids=ids, use_cache=False).logits, ids, u).backward()

    def kept(share: float) -> list[int]:
        with torch.no_grad():
            scores = []
            for ids, places, u in packs:
                logp = run(ids, places).log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None]).squeeze(-1)
                ends = [*(places == 0).flatten().nonzero().flatten().tolist(), ids.shape[1]]
                delight = (-u * logp).flatten()
                scores += [float(delight[a:b].sum()) for a, b in itertools.pairwise(ends)]
        return torch.tensor(scores).topk(max(1, round(share * TEXTS))).indices.sort().values.tolist()

    def floor(share: float) -> Callable[[], None]:
        short = batch.pack(kept(share))

        def step() -> None:
            for ids, places, u in packs:
                with torch.no_grad():
                    logits = run(ids, places)
                policy_loss(logits.requires_grad_(), ids, u).backward()
            ids, places, u = short
            policy_loss(run(ids, places), ids, u).backward()

        return step

    nothing = contextlib.nullcontext()
    found = {"full, padded": (nothing, padded), "full, packed": (nothing, packed)}
    for share in (1 / 32, 1 / 8):
        name = f"1/{round(1 / share)}"
        found |= {
            f"floor {name}": (nothing, floor(share)),
            f"gated {name}, packed": (kondo.gated(model, rate=share, window=PACKS), packed),
            f"gated {name}, padded": (kondo.gated(model, rate=share), padded),
        }
    return found


def measure(size: str, batch: Batch, rounds: int) -> list[dict[str, Any]]:
    """Medians over rounds of a model's variants, which are also printed."""
    torch.manual_seed(0)
    heads = SIZES[size]["num_attention_heads"]
    model = Llama(vocab_size=VOCABULARY, num_key_value_heads=heads, max_position_embeddings=128, **SIZES[size]).model
    made = variants(model, batch)
    spent: dict[str, list[float]] = {name: [] for name in made}
    for turn in tqdm(range(rounds + 1), desc=f"packed, {size}", unit="round"):
        for name, (context, step) in made.items():
            with context:
                for _ in range(1 if turn else 2):  # the first two steps get to know the model
                    begun = time.perf_counter()
                    step()
                    model.zero_grad()
            if turn:
                spent[name].append(time.perf_counter() - begun)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"\n{f'{parameters / 1e6:.0f}M parameters':<24} {'ms':>8} {'x full, packed':>15} {'x floor':>8}")
    rows = []
    for name, seconds in spent.items():
        share = name.split()[1].strip(",") if name.startswith(("floor", "gated")) else None
        ratio = statistics.median(a / b for a, b in zip(seconds, spent["full, packed"], strict=True))
        above = (
            statistics.median(a / b for a, b in zip(seconds, spent[f"floor {share}"], strict=True)) if share else 0.0
        )
        ms = 1e3 * statistics.median(seconds)
        print(f"{name:<24} {ms:>8.0f} {ratio:>15.2f} {f'{above:.2f}' if share else '':>8}")
        rows.append({"parameters": parameters, "variant": name, "ms": ms, "of_full": ratio, "of_floor": above or None})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    batch = Batch()
    padded, tokens = TEXTS * int(batch.lengths.max()), int(batch.lengths.sum())
    print(f"{TEXTS} texts, {tokens:,} tokens; padded {padded:,}: {1 - tokens / padded:.0%} of these are padding")
    rows = [row for size in SIZES for row in measure(size, batch, args.rounds)]
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "packed.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
