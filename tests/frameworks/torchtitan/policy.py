"""torchtitan's PolicyTrainer on as many ranks as there are: gated, masked by what a gate decided, or as it is."""

import asyncio
import dataclasses
import os
import tempfile
import warnings

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.experiments.rl.actors.trainer import PolicyTrainer
from torchtitan.experiments.rl.losses import DAPOLoss, GRPOLoss
from torchtitan.experiments.rl.types import TrainingMicrobatch

import kondo_hooks as kondo
from tests.frameworks.torchtitan.parts import VOCABULARY, spec
from tests.reference import Runs

LENGTH = 24
AC = {"full": FullAC, "selective": SelectiveAC}
LOSSES = {"grpo": GRPOLoss.Config, "dapo": lambda: DAPOLoss.Config(ratio_clip_high=0.28)}


def config(loss="grpo", chunks=0, ac=None, ranks=1):
    found = LOSSES[loss]()
    return PolicyTrainer.Config(
        loss=ChunkedLossWrapper.Config(num_chunks=chunks, loss_fn=found) if chunks else found,
        training=TrainingConfig(
            local_batch_size=1, seq_len=LENGTH, dtype="float32", mixed_precision_param="float32", max_norm=100.0
        ),
        parallelism=ParallelismConfig(data_parallel_shard_degree=ranks, spmd_backend="partial_dtensor"),
        optimizer=default_adamw(lr=0.01, fused=False, foreach=False),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0),
        checkpoint=CheckpointManager.Config(enable=False),
        ac_config=AC[ac].Config() if ac else None,
    )


def micro_batches(count=2, rows=1, seed=0, longest=True):
    """Packs of answers with a prompt each, as the batcher lays them out: positions start again, padding is a text."""
    g, found = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        positions, mask, advantages = [], [], []
        for _ in range(rows):
            lengths = [8] if longest else []  # max_q is an argument of its own
            while sum(lengths) < LENGTH - 3:
                lengths.append(min(int(torch.randint(4, 9, (), generator=g)), LENGTH - sum(lengths)))
            real = len(lengths)
            lengths += [LENGTH - sum(lengths)] if sum(lengths) < LENGTH else []
            positions.append(torch.cat([torch.arange(n) for n in lengths]))
            mask.append(torch.cat([(torch.arange(n) > 0) & (i < real) for i, n in enumerate(lengths)]))
            u = torch.randn(len(lengths), generator=g)
            advantages.append(torch.cat([u[i].expand(n) for i, n in enumerate(lengths)]) * mask[-1])
        ids, labels = (torch.randint(1, VOCABULARY, (rows, LENGTH), generator=g) for _ in range(2))
        found.append(
            TrainingMicrobatch(
                token_ids=ids,
                labels=labels,
                positions=torch.stack(positions),
                generator_logprobs=torch.full((rows, LENGTH), -3.4) + 0.1 * torch.rand(rows, LENGTH, generator=g),
                loss_mask=torch.stack(mask),
                advantages=torch.stack(advantages),
            )
        )
    return found


def texts_of(batch):
    """(B, L) which text each token is in."""
    return (batch.positions == 0).flatten().cumsum(0).view(batch.positions.shape) - 1


def delight_of(batch):
    """(S,) advantage x surprisal of each text, by the generator's log-probs."""
    text = texts_of(batch).flatten()
    each = (-batch.generator_logprobs * batch.advantages * batch.loss_mask).flatten()
    return torch.zeros(int(text[-1]) + 1).index_add(0, text, each)


def norm_of(batch):
    """(S,) of each text the size of its gradient, about."""
    text = texts_of(batch).flatten()
    return torch.zeros(int(text[-1]) + 1).index_add(0, text, batch.advantages.square().flatten()).sqrt()


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def masked(batch, factors):
    """The micro-batch without the terms of dropped texts, or tokens, those of kept ones times their factor."""
    text = texts_of(batch)
    each = factors.view(int(text.max()) + 1, -1)
    weights = each[text, batch.positions if each.shape[1] > 1 else 0]
    return dataclasses.replace(batch, advantages=batch.advantages * weights, loss_mask=batch.loss_mask & (weights != 0))


def made(folder, ranks=1, model="llama3", **options):
    torch.manual_seed(0)
    trainer = PolicyTrainer(
        config(ranks=ranks, **options),
        model_spec=spec(model),
        compile_config=CompileConfig(enable=False),
        output_dir=folder,
    )
    for module in trainer.model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # the factor of 1 that gloo has no operation for
    return trainer


def main(argument):
    """Two steps, gated by a rule, or masked, or as they are; returns what is to be compared."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    options, rule = dict(argument["options"]), dict(argument.get("rule") or {})
    count, rows, longest = options.pop("count", 2), options.pop("rows", 1), options.pop("longest", True)
    first, waits, weighs = rule.pop("first", False), rule.get("window", 1) != 1, "noise" in rule
    found = {"gradients": [], "metrics": [], "decided": [], "asked": 0}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer = made(folder, **options)
        rank, ranks = trainer.dp_rank, trainer.dp_size
        runs = Runs(trainer.model, VOCABULARY)
        masks = iter(argument["masks"][rank]) if "masks" in argument else None

        def note(*_):
            found["gradients"].append([full(p.grad).tolist() for p in trainer.model.parameters()])

        for optimizer in trainer.optimizers.optimizers:
            optimizer.register_step_pre_hook(note)
        with kondo.gated(trainer.model, enabled=bool(rule), **rule) as gate:
            for step in range(2):
                of_ranks = [micro_batches(count, rows, 10 * step + r, longest) for r in range(ranks)]
                for batches in zip(*of_ranks, strict=True):
                    batches = list(batches)
                    found["asked"] += batches[rank].token_ids.numel()
                    if masks is not None:
                        batches[rank] = masked(batches[rank], torch.tensor(next(masks)))
                    if first:
                        factors = gate.select(norm=norm_of(batches[rank])).factors() if weighs else None
                        given = {"delight": delight_of(batches[rank])} if factors is None else {"kept": factors != 0}
                        decision = gate.preselect(**given)
                        batches[rank] = masked(batches[rank], decision.factors() if decision else factors)
                    found["metrics"].append(asyncio.run(trainer.forward_backward(batches, 30 * count)))
                    if rule and not waits:
                        found["decided"].append(gate.last.factors().tolist())
                found["metrics"].append(asyncio.run(trainer.optim_step()).metrics)
                if waits:
                    sizes = [int(texts_of(pack).max()) + 1 for pack in of_ranks[rank]]
                    found["decided"] += [factors.tolist() for factors in gate.last.factors().split(sizes)]
        dist.destroy_process_group()
    found["told"] = [str(each.message) for each in told if issubclass(each.category, kondo.KondoWarning)]
    return {**found, "rows": gate.stats.rows, "forwarded": gate.stats.forwarded, "tokens": sum(runs.tokens)}
