"""Trainers on several ranks: a gated run against the same trainer with the dropped rows' terms masked."""

import sys
import tempfile

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import DistributedType, PartialState
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import kondo_hooks as kondo
from tests import hf
from tests.ranks.launch import at

BATCH, STEPS, RATE = 4, 3, 0.25
BASE = {**hf.TRAINING, "per_device_train_batch_size": BATCH, "ddp_backend": "gloo"}


def zero(stage):
    return {
        "deepspeed": {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        }
    }


def fsdp(version):
    config = {"fsdp_version": version, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    config |= {"sync_module_states": False, "cpu_ram_efficient_loading": False, "use_orig_params": True}
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": config}


def on_cpu(trainer):
    """accelerate offers FSDP on accelerators alone; what it does with it is the same."""
    accelerator = trainer.accelerator
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    PartialState._shared_state["device"] = accelerator.state.device = torch.device("cpu")
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    trainer.is_fsdp_enabled = True
    return trainer


HOSTS = {
    "ddp": {},
    "ddp checkpointing": {"gradient_checkpointing": True},
    "fsdp1": fsdp(1),
    "fsdp2": fsdp(2),
    "zero2": zero(2),
    "zero3": zero(3),
}


def make(options):
    args = TrainingArguments(tempfile.mkdtemp(), **{**BASE, **options})
    trainer = Trainer(hf.llama(), args=args, train_dataset=hf.rows(), data_collator=hf.pad)
    return on_cpu(trainer) if "fsdp" in options else trainer


def local(trainer):
    """This rank's part of every parameter."""
    parts = {}
    for name, p in trainer.model.named_parameters():
        value = p.ds_tensor if hasattr(p, "ds_tensor") else p.to_local() if isinstance(p, DTensor) else p
        parts[name] = value.detach().clone().float()
    return parts


def difference(found, wanted, start):
    moved = max(float((wanted[name] - start[name]).abs().max()) for name in wanted if wanted[name].numel())
    apart = max(float((found[name] - wanted[name]).abs().max()) for name in wanted if wanted[name].numel())
    return {"moved": moved, "apart": apart / moved}


def sft(host, how, scope):
    options = HOSTS[host]
    trainer = make(options)
    if how == "callback":
        recorder = hf.Recorder(rate=RATE, scope=scope)
        trainer.add_callback(recorder)
        trainer.train()
    else:
        with kondo.gated(trainer.model, rate=RATE, scope=scope) as gate:
            recorder = hf.Recorder(gate)
            trainer.add_callback(recorder)
            trainer.train()
    found = local(trainer)
    metrics = trainer.state.log_history[0]
    at("reference")
    reference = make(options)
    hf.mask_head(reference, recorder.masks(BATCH))
    reference.train()
    still = make({**options, "max_steps": 1, "learning_rate": 0.0})  # sharded in the same way, and not moved
    still.train()
    return {
        **difference(found, local(reference), local(still)),
        "rows": [len(d.delight) for d in recorder.decisions],
        "kept": [len(d.kept) for d in recorder.decisions],
        "engine": recorder.engine,
        "logged": sorted(name for name in metrics if name.startswith("kondo/")) if dist.get_rank() == 0 else None,
    }


def policy(host, kind, how, **options):
    """GRPO or RLOO: the one line, or screen-first."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    from kondo_hooks.integrations.trl import KondoMixin
    from tests.masking import masking

    base, config = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[kind]
    seen, forwarded = [], []
    folder = tempfile.mkdtemp()
    hf.saved(hf.llama(), folder)  # before there are ranks, of which one alone would save

    class ScreenFirst(KondoMixin, base):
        def compute_loss(self, model, inputs, **kwargs):
            seen.append(inputs["kondo_factors"].clone())
            before = self.kondo.gate.stats.forwarded
            loss = super().compute_loss(model, inputs, **kwargs)
            forwarded.append(self.kondo.gate.stats.forwarded - before)
            return loss

    def build(cls, **mine):
        sizes = {"num_generations": 4, "max_completion_length": 6, "beta": 0.05}
        args = config(tempfile.mkdtemp(), **{**BASE, **HOSTS[host], **sizes, **options})
        trainer = cls(
            LlamaForCausalLM.from_pretrained(folder),
            reward_funcs=hf.reward,
            args=args,
            train_dataset=hf.prompts(),
            processing_class=hf.tokenizer(),
            **mine,
        )
        return on_cpu(trainer) if "fsdp" in HOSTS[host] else trainer

    if how == "screen-first":
        trainer = build(ScreenFirst, kondo={"rate": RATE, "scope": "global"})
        trainer.train()
        found = seen
    else:
        trainer = build(base)
        with kondo.gated(trainer.model, rate=RATE) as gate:
            recorder = hf.Recorder(gate)
            trainer.add_callback(recorder)
            trainer.train()
        found = list(recorder.masks(BATCH))
    at("reference")
    reference = build(masking(base))
    reference.masks = iter([mask.float() for mask in found])
    reference.train()
    still = build(base)
    still.args.max_steps, still.args.learning_rate = 1, 0.0
    still.train()
    logged = trainer.state.log_history[0]
    return {
        **difference(local(trainer), local(reference), local(still)),
        "kept": [int(mask.sum()) for mask in found],
        "forwarded": forwarded,
        "finite": all(torch.isfinite(torch.tensor(float(logged[name]))).item() for name in ("loss", "entropy", "kl")),
    }


def main(argument):
    what, *rest = argument
    torch.set_num_threads(1)
    return getattr(sys.modules[__name__], what)(*rest)
