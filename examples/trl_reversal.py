"""GRPO on token reversal with TRL's own, unmodified trainer: all rows, the gate, random rows, screen-first.

A prompt of H symbols out of M; the answer is the same backwards; the reward is the fraction of its tokens that are
right. Tokenizer and a small Llama are made here, nothing is downloaded. Prints the reward and where the seconds went,
and writes OUT/trl_reversal.csv and .png:

    python examples/trl_reversal.py
"""

import argparse
import csv
import logging
import os
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import kondo_hooks as kondo
from kondo_hooks.integrations.trl import KondoMixin


class ScreenFirst(KondoMixin, GRPOTrainer):
    """GRPOTrainer that forwards kept rows only."""


@dataclass
class Method:
    """How one run is gated."""

    name: str
    color: str
    gate: dict[str, Any] = field(default_factory=dict)
    trainer: type[GRPOTrainer] = GRPOTrainer


@dataclass
class Run:
    """Mean reward of every step, and the seconds of the whole run by where they went."""

    rewards: list[float] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    generation: float = 0.0
    learner: float = 0.0
    total: float = 0.0
    rows: int = 0


def methods(rate: float) -> list[Method]:
    return [
        Method("all rows", "#222222"),
        Method(f"gated {rate:.0%}", "#dc6763", {"rate": rate}),
        Method(f"random {rate:.0%}", "#a9a9a9", {"rate": rate, "priority": "uniform"}),
        Method(f"screen-first {rate:.0%}", "#48a785", {"rate": rate}, ScreenFirst),
    ]


def make_tokenizer(symbols: int) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", *map(str, range(symbols))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Fraction of the answer's tokens that are the prompt's, backwards."""
    scores = []
    for prompt, ids in zip(prompts, completion_ids, strict=True):
        wanted = [int(word) + 3 for word in reversed(prompt.split())]
        scores.append(sum(a == b for a, b in zip(ids, wanted, strict=False)) / len(wanted))
    return scores


class Curve(TrainerCallback):
    """Notes the reward of each step as TRL logs it."""

    def __init__(self, run: Run, bar: tqdm):
        self.run, self.bar, self.start = run, bar, time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "reward" in logs:
            self.run.rewards.append(logs["reward"])
            self.run.clock.append(time.perf_counter() - self.start)
            self.bar.update()


def timed(owner: Any, name: str) -> list[float]:
    """Seconds of every call of a method."""
    spent: list[float] = []
    original = getattr(owner, name)

    def clocked(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    setattr(owner, name, clocked)
    return spent


def train(method: Method, seed: int, args: argparse.Namespace, bar: tqdm) -> Run:
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(args.symbols)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        intermediate_size=2 * args.width,
        num_hidden_layers=3,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    prompts = torch.randint(args.symbols, (10 * args.steps, args.length)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        options = GRPOConfig(
            folder,
            per_device_train_batch_size=10 * args.samples,  # 10 prompts
            num_generations=args.samples,
            max_completion_length=args.length,
            generation_kwargs={"suppress_tokens": [0, 1, 2]},  # answers are H symbols
            scale_rewards="none",
            loss_type="grpo",
            learning_rate=args.lr,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            max_steps=args.steps,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            seed=seed,
        )
        screen_first = {"kondo": method.gate} if issubclass(method.trainer, KondoMixin) else {}
        trainer = method.trainer(
            LlamaForCausalLM(config),
            reward_funcs=reward,
            args=options,
            train_dataset=Dataset.from_dict({"prompt": [" ".join(map(str, prompt)) for prompt in prompts]}),
            processing_class=tokenizer,
            **screen_first,
        )
        run = Run()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Curve(run, bar))
        # Learning is a training step without the generation; a screen-first pass over all answers is learning, too.
        steps, generations = timed(trainer, "training_step"), timed(trainer, "_generate_and_score_completions")
        screens = timed(trainer, "_kondo_logps") if screen_first else []
        start = time.perf_counter()
        with kondo.gated(trainer.model, **method.gate, enabled=bool(method.gate) and not screen_first) as gate:
            trainer.train()
        run.total = time.perf_counter() - start
        run.generation = sum(generations) - sum(screens)
        run.learner = sum(steps) - run.generation
        batch = 10 * args.samples * args.steps
        run.rows = gate.stats.forwarded if gate.enabled else round(batch * method.gate.get("rate", 1.0))
    return run


def table(runs: dict[str, list[Run]], last: int) -> str:
    lines = [
        f"{'method':<18} {'reward at the end':>18} {'backward rows':>14} | {'seconds: learner':>16} {'generation':>11} "
        f"{'end to end':>11} | {'x all rows: learner':>19} {'end to end':>11}"
    ]
    base = next(iter(runs.values()))
    for name, each in runs.items():
        ends = [statistics.mean(run.rewards[-last:]) for run in each]
        spread = f"{min(ends):.3f} to {max(ends):.3f}" if len(ends) > 1 else f"{ends[0]:.3f}"
        learner, generation, total = (
            statistics.median(getattr(run, what) for run in each) for what in ("learner", "generation", "total")
        )
        ratios = [
            statistics.median(getattr(a, what) / getattr(b, what) for a, b in zip(each, base, strict=True))
            for what in ("learner", "total")
        ]
        lines.append(
            f"{name:<18} {spread:>18} {each[0].rows:>14,} | {learner:>16.1f} {generation:>11.1f} {total:>11.1f} "
            f"| {ratios[0]:>19.2f} {ratios[1]:>11.2f}"
        )
    return "\n".join(lines)


def write(folder: Path, runs: dict[str, list[Run]], head: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "trl_reversal.csv").open("w", newline="") as file:
        file.write(f"# {head}\n")
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "step", "reward", "seconds"])
        for name, each in runs.items():
            for seed, run in enumerate(each):
                for step, (value, clock) in enumerate(zip(run.rewards, run.clock, strict=True), 1):
                    writer.writerow([name, seed, step, f"{value:.4f}", f"{clock:.3f}"])


def draw(path: Path, runs: dict[str, list[Run]], chosen: list[Method]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for method in chosen:
        each = runs[method.name]
        curves = torch.tensor([run.rewards for run in each])
        smooth = curves.unfold(1, min(10, curves.shape[1]), 1).mean(-1)
        start = curves.shape[1] - smooth.shape[1]
        clock = torch.tensor([run.clock for run in each])[:, start:].mean(0)
        for axis, x in zip(axes, (torch.arange(start + 1, curves.shape[1] + 1), clock), strict=True):
            axis.plot(x, smooth.mean(0), color=method.color, label=method.name)
            axis.fill_between(x, smooth.amin(0), smooth.amax(0), color=method.color, alpha=0.12, lw=0)
    axes[0].set(xlabel="steps", ylabel="reward (mean of 10 steps; band: all seeds)")
    axes[1].set(xlabel="seconds, end to end")
    axes[0].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle("Token reversal, GRPO, an unmodified trl.GRPOTrainer")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=5, help="H, symbols of a prompt")
    parser.add_argument("--symbols", type=int, default=2, help="M, to choose from")
    parser.add_argument("--samples", type=int, default=10, help="answers to each of 10 prompts")
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="names of methods")
    parser.add_argument("--quick", action="store_true", help="60 steps of one seed")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds = 60, 1
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    chosen = [method for method in methods(args.rate) if not args.only or method.name in args.only]
    runs: dict[str, list[Run]] = {method.name: [] for method in chosen}
    with tqdm(total=args.seeds * len(chosen) * args.steps, unit="step", smoothing=0.05) as bar:
        for seed in range(args.seeds):
            for method in chosen:
                bar.set_description(f"seed {seed} {method.name:<17}")
                runs[method.name].append(train(method, seed, args, bar))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {args.threads} threads"
    head = (
        f"python examples/trl_reversal.py --length {args.length} --symbols {args.symbols} --samples {args.samples} "
        f"--rate {args.rate} --width {args.width} --lr {args.lr} --steps {args.steps} --seeds {args.seeds} "
        f"| torch {torch.__version__} | {device}"
    )
    print(head, table(runs, max(1, args.steps // 10)), sep="\n")
    write(args.out, runs, head)
    draw(args.out / "trl_reversal.png", runs, chosen)
    print(f"wrote {args.out / 'trl_reversal.csv'} and {args.out / 'trl_reversal.png'}")


if __name__ == "__main__":
    main()
