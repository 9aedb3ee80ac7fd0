"""What the gate saves of a GRPO step on a Llama-like model: of the learner's step, and end to end with generation.

    python benchmarks/llm.py                                   # on a GPU where there is one
    python benchmarks/llm.py --rounds 20                       # adds rounds to what is there
    python benchmarks/llm.py --quick                           # a tiny model
    python benchmarks/llm.py --draw --out benchmarks/results   # the table and the picture of what is committed

A ``LlamaForCausalLM`` of random weights: about 10M parameters in float32 on a CPU, 110M in bfloat16 on a GPU. Eight
answers to each prompt, sampled by ``generate`` with a KV cache; the reward is the fraction of an answer's tokens that
are even, the advantage is the reward less the mean of its group, an answer counts up to its first token below V/64, and
the loss is clipped and a mean over the tokens of the batch. The learner's step is all of the batch's micro-batches and
one AdamW update, at a learning rate of 0: this is about cost, and so all variants meet the same policy.

All variants take turns within a round, in random order, on the same answers. In each turn the variant generates them
again, inside its own open gate, so that what an open gate costs a sampler is in the end-to-end ratio. The file holds
every round; the table has medians over rounds and, in brackets, the lowest and the highest. "rows" are those that ran
with a graph; "tokens/s" counts the answers' tokens of the whole batch, dropped ones too. The floor is a no-grad forward
of each micro-batch, the loss on its outputs, and one forward and backward of the kept rows, with nothing of ours in
them; "of floor" is blank where other rows are run than the floor's. "peak MB" is on a GPU the most that was allocated
during the learner's step above what was held before it, and on a CPU the most that autograd held for backwards
(``torch.autograd.graph.saved_tensors_hooks``), without parameters, and what waited for the end of a window. "windowed"
takes all micro-batches as one population, replayed in passes of a micro-batch's size.

Where the gate pays little stands in the table too: at a rate of 50%, and in the second setting, a single micro-batch
of 8, of which 3% is still one row, and in which sampling takes longer than learning.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import kondo_gate
import matplotlib.pyplot as plt
import pandas as pd
import record
import style
import torch
from step import saved_bytes
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import kondo_hooks as kondo

FULL, PEER, FLOOR = "full step", "kondo-gate 0.1.0, 3%", "floor, 3%"
GROUP = 8


@dataclass(frozen=True)
class Task:
    """A model, the batch that it learns from, and a round: one turn of each variant."""

    setting: str
    vocabulary: int
    width: int
    ff: int
    layers: int
    heads: int
    batch: int
    micro_batch: int
    prompt: int
    completion: int
    round: int = 0

    @property
    def window(self) -> int:
        return self.batch // self.micro_batch


def settings(cuda: bool, quick: bool) -> list[Task]:
    if quick:
        batch = Task("batch", 500, 128, 344, 4, 4, batch=64, micro_batch=8, prompt=16, completion=16)
    elif cuda:
        batch = Task("batch", 16_000, 768, 2048, 12, 12, batch=256, micro_batch=32, prompt=64, completion=192)
    else:
        batch = Task("batch", 4000, 320, 864, 6, 5, batch=64, micro_batch=8, prompt=16, completion=48)
    return [batch, replace(batch, setting="small batch", batch=GROUP, micro_batch=GROUP)]


@dataclass(frozen=True)
class Answers:
    """Sampled answers, or a part of them.

    Attributes:
        ids: (B, P + C) prompts and answers.
        logp: (B, C) log-probs of the answers' tokens as the sampler saw them.
        mask: (B, C) 1 where a token counts.
        advantages: (B, 1).
        tokens: () how many count in the whole batch: the loss's denominator in all of its parts.
    """

    ids: Tensor
    logp: Tensor
    mask: Tensor
    advantages: Tensor
    tokens: Tensor

    def rows(self, rows: slice) -> "Answers":
        return Answers(self.ids[rows], self.logp[rows], self.mask[rows], self.advantages[rows], self.tokens)

    def micro_batches(self, size: int) -> Iterator["Answers"]:
        return (self.rows(slice(start, start + size)) for start in range(0, len(self.ids), size))


def taken_logp(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def grpo_loss(logits: Tensor, part: Answers) -> Tensor:
    ratio = (taken_logp(logits, part.ids[:, -logits.shape[1] :]) - part.logp).exp()
    terms = torch.minimum(ratio * part.advantages, ratio.clamp(0.8, 1.2) * part.advantages)
    return -(terms * part.mask).sum() / part.tokens


Learn = Callable[[Answers], None]


class Work:
    """A model, its sampler, and the ways to learn from what it samples; each leaves its gradients in ``.grad``."""

    def __init__(self, setting: Task):
        self.setting, self.device = setting, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=setting.vocabulary,
            hidden_size=setting.width,
            intermediate_size=setting.ff,
            num_hidden_layers=setting.layers,
            num_attention_heads=setting.heads,
            max_position_embeddings=setting.prompt + setting.completion,
            bos_token_id=None,
            eos_token_id=None,  # every answer is sampled to its full length
        )
        self.model = LlamaForCausalLM(config).to(self.device)
        if self.device.type == "cuda":
            self.model.to(torch.bfloat16)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)
        prompts = torch.randint(setting.vocabulary, (setting.batch // GROUP, setting.prompt), device=self.device)
        self.prompts = prompts.repeat_interleave(GROUP, 0)

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def sample(self, seed: int) -> Answers:
        torch.manual_seed(seed)
        made = self.model.generate(
            self.prompts,
            attention_mask=torch.ones_like(self.prompts),
            do_sample=True,
            top_k=0,
            max_new_tokens=self.setting.completion,
            output_logits=True,
            return_dict_in_generate=True,
        )
        answers = made.sequences[:, self.setting.prompt :]
        logp = torch.stack([taken_logp(*step) for step in zip(made.logits, answers.unbind(1), strict=True)], 1)
        ends = answers < self.setting.vocabulary // 64
        mask = (ends.cumsum(1) - ends.long() == 0).float()
        rewards = ((answers % 2 == 0) * mask).sum(1) / mask.sum(1)
        groups = rewards.view(-1, GROUP)
        advantages = (groups - groups.mean(1, keepdim=True)).view(-1, 1)
        return Answers(made.sequences, logp, mask, advantages, mask.sum())

    def logits(self, ids: Tensor) -> Tensor:
        """(B, P + C) -> (B, C, V), each of the token that follows."""
        keep = self.setting.completion + 1
        return self.model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[:, :-1]

    def full(self, answers: Answers) -> None:
        for part in answers.micro_batches(self.setting.micro_batch):
            grpo_loss(self.logits(part.ids), part).backward()

    def peer(self, answers: Answers) -> None:
        gate = kondo_gate.KondoGate(kondo_gate.KondoGateConfig(gate_rate=0.03))
        for part in answers.micro_batches(self.setting.micro_batch):
            logits = self.logits(part.ids)
            logp = taken_logp(logits, part.ids[:, -logits.shape[1] :])
            weights = gate.compute_gate((logp * part.mask).sum(1), part.advantages.squeeze(1)).gate_weights
            grpo_loss(logits, replace(part, mask=part.mask * weights.unsqueeze(1))).backward()

    def screen_first(self, gate: kondo.Gated, answers: Answers) -> None:
        """A micro-batch without a kept row needs no forward, either."""
        kept = torch.zeros(len(answers.ids), dtype=torch.bool, device=self.device)
        kept[gate.select(answers.logp, answers.advantages.expand_as(answers.mask), answers.mask).kept] = True
        size = self.setting.micro_batch
        for part, of_part in zip(answers.micro_batches(size), kept.split(size), strict=True):
            if of_part.any():
                gate.preselect(kept=of_part)
                grpo_loss(self.logits(part.ids), part).backward()

    def kept_rows(self) -> int:
        return max(1, round(0.03 * self.setting.batch))

    def floor(self, answers: Answers) -> None:
        """The kept rows are given: choosing them is nothing that the hardware must pay for."""
        delight = -(answers.logp * answers.mask).sum(1) * answers.advantages.squeeze(1)
        kept = torch.zeros(len(delight), dtype=torch.bool, device=self.device)
        kept[delight.topk(self.kept_rows()).indices] = True
        size, grads = self.setting.micro_batch, []
        for part, of_part in zip(answers.micro_batches(size), kept.split(size), strict=True):
            with torch.no_grad():
                logits = self.logits(part.ids)
            grpo_loss(logits.requires_grad_(), part).backward()
            grads.append(logits.grad[of_part])
        self.logits(answers.ids[kept]).backward(torch.cat(grads))

    def update(self, learn: Learn, answers: Answers) -> None:
        learn(answers)
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass
class Variant:
    """A way to learn, with the gate that is open around it, or else the rows that it runs with a graph."""

    learn: Learn
    rows: int = 0
    gate: kondo.Gated | None = None

    def context(self) -> AbstractContextManager[Any]:
        return self.gate or nullcontext()


def variants(work: Work) -> dict[str, Variant]:
    windowed = {"window": work.setting.window, "micro_batch_size": work.setting.micro_batch}

    def gated(rate: float, **options: Any) -> Variant:
        return Variant(work.full, gate=kondo.gated(work.model, rate=rate, **options))

    def screen_first(rate: float) -> Variant:
        gate = kondo.gated(work.model, rate=rate)
        return Variant(partial(work.screen_first, gate), gate=gate)

    chosen = {
        FULL: Variant(work.full, work.setting.batch),
        PEER: Variant(work.peer, work.setting.batch),
        FLOOR: Variant(work.floor, work.kept_rows()),
        **{f"gated, {rate:.0%}": gated(rate) for rate in (0.03, 0.1, 0.5)},
        **{f"windowed, {rate:.0%}": gated(rate, **windowed) for rate in (0.03, 0.1, 0.5)},
        "random rows, 3%": gated(0.03, priority="uniform", **windowed),
        **{f"screen-first, {rate:.0%}": screen_first(rate) for rate in (0.03, 0.1)},
    }
    if work.setting.window > 1:
        return chosen
    # A window of one is none, and 10% of 8 rows are as many as 3%.
    return {name: variant for name, variant in chosen.items() if "windowed" not in name and "10%" not in name}


def turn(work: Work, variant: Variant, seed: int) -> dict[str, float]:
    """Sample and learn once: seconds, rows with a graph, and on a GPU the bytes that were allocated at most."""
    cuda, rows, held, peak = work.device.type == "cuda", variant.rows, 0, 0
    with variant.context():
        before = variant.gate.stats.forwarded if variant.gate else 0
        start = work.clock()
        answers = work.sample(seed)
        sampled = work.clock()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        work.update(variant.learn, answers)
        end = work.clock()
        if cuda:
            peak = torch.cuda.max_memory_allocated() - held
        if variant.gate:
            rows = variant.gate.stats.forwarded - before
    return {"rows": rows, "generation": sampled - start, "learner": end - sampled, "peak": peak}


def saved(work: Work, variant: Variant) -> int:
    """Bytes that one learner's step holds at most for backwards."""
    parameters = {p.untyped_storage().data_ptr() for p in work.model.parameters()}
    with variant.context():
        answers = work.sample(0)
        most = saved_bytes(lambda: work.update(variant.learn, answers), parameters)
    return most + (variant.gate.stats.waiting_bytes if variant.gate else 0)


@cache
def prepared(setting: Task) -> tuple[Work, dict[str, Variant], dict[str, int]]:
    """The variants after a first turn that is not measured, and on a CPU what each then holds for backwards."""
    work = Work(setting)
    chosen = variants(work)
    for variant in chosen.values():
        turn(work, variant, seed=0)
    on_cpu = work.device.type == "cpu"
    return work, chosen, {name: saved(work, variant) for name, variant in chosen.items() if on_cpu}


def measure(task: Task) -> record.Rows:
    """One row a variant."""
    work, chosen, held = prepared(replace(task, round=0))
    order = [*chosen]
    random.Random(task.round).shuffle(order)  # what ran before leaves its mark on the allocator and the caches
    turns = {name: turn(work, chosen[name], seed=task.round) for name in order}
    parameters = sum(p.numel() for p in work.model.parameters())
    return [
        {"parameters": parameters, "step": name, **turns[name], "peak": held.get(name, turns[name]["peak"])}
        for name in chosen
    ]


def ratios(turns: pd.DataFrame, phase: str, of: str) -> pd.DataFrame:
    """(rounds, variants) seconds over those of one variant in the same round."""
    seconds = turns.pivot(index="round", columns="step", values=phase)
    return seconds.div(seconds[of], axis=0)


def middle(values: "pd.Series[float]") -> str:
    return f"{values.median():.3f} ({values.min():.2f}-{values.max():.2f})"


def report(turns: pd.DataFrame) -> None:
    """Print the table of one setting."""
    of_full, of_floor = (ratios(turns, "learner", of) for of in (FULL, FLOOR))
    end_to_end, rows = ratios(turns, "all", FULL), turns.groupby("step").rows.median()
    table = []
    for name, own in turns.groupby("step", sort=False):
        table.append(
            {
                "step": name,
                "rows": f"{rows[name]:.0f}",
                "learner ms": f"{1000 * own.learner.median():.0f}",
                "of full": middle(of_full[name]),
                "of floor": middle(of_floor[name]) if rows[name] == rows[FLOOR] else "-",
                "tokens/s": f"{(own.batch * own.completion / own.learner).median():,.0f}",
                "generation ms": f"{1000 * own.generation.median():.0f}",
                "end to end": middle(end_to_end[name]),
                "peak MB": f"{own.peak.max() / 2**20:.1f}",
            }
        )
    record.print_table(table, f"{title(turns)}, {turns.parameters.iloc[0] / 1e6:.1f}M parameters")


def title(turns: pd.DataFrame) -> str:
    one = turns.iloc[0]
    passes = one.batch // one.micro_batch
    return f"{one.setting}: {passes} x {one.micro_batch} answers of {one.prompt} + {one.completion} tokens"


def draw(frame: pd.DataFrame, device: str, path: Path) -> None:
    figure, axes = plt.subplots(1, frame.setting.nunique(), figsize=(12, 4.8), sharex=True, squeeze=False)
    for axis, (_, turns) in zip(axes.flat, frame.groupby("setting", sort=False), strict=True):
        names = [*turns.step.unique()]
        bars = {"learner": ("learner's step", style.color("gated")), "all": ("with generation", "#9db8d9")}
        for shift, (phase, (label, color)) in zip((-0.2, 0.2), bars.items(), strict=True):
            of_full = ratios(turns, phase, FULL)[names]
            at, low, high = of_full.median(), of_full.min(), of_full.max()
            places = [place + shift for place in range(len(names))]
            axis.barh(places, at, 0.4, xerr=(at - low, high - at), error_kw={"lw": 0.8}, label=label, color=color)
        floor = ratios(turns, "learner", FULL)[FLOOR].median()
        axis.axvline(floor, color=style.INK, ls=":", lw=1, label="floor of the learner")
        axis.axvline(1, color=style.GRAY, lw=0.8)
        axis.set(yticks=range(len(names)), yticklabels=names, xlabel="time, full step = 1")
        axis.set_title(title(turns), fontsize=9)
        axis.invert_yaxis()
    axes[0, 0].legend(loc="lower right", fontsize=8)
    figure.suptitle(f"GRPO step, {frame.parameters[0] / 1e6:.0f}M parameters on {device}", fontsize=10)
    record.save(figure, path)


def main() -> None:
    parser = record.parser(__doc__, seeded=False)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    args = parser.parse_args()
    path, rounds = args.out / "llm.csv", 3 if args.quick else args.rounds
    if not args.draw:
        chosen = settings(torch.cuda.is_available(), args.quick)
        tasks = [replace(setting, round=i + 1) for setting in chosen for i in range(rounds)]
        record.collect(tasks, measure, path, 1, ["transformers", "kondo-gate"], args.threads)
    frame = record.read(path).assign(all=lambda turns: turns.learner + turns.generation)
    head = path.read_text().partition("\n")[0].removeprefix("# ")
    print(head)
    for _, turns in frame.groupby("setting", sort=False):
        report(turns)
    draw(frame, head.split(" | ")[-1], path.with_suffix(".png"))


if __name__ == "__main__":
    main()
