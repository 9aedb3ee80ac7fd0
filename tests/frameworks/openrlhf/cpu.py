"""OpenRLHF's own trainer of the actor on a CPU: what it asks of CUDA is answered here."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist

os.environ["DS_ACCELERATOR"] = "cpu"
sys.path.insert(0, str(Path(__file__).parent / "stubs"))

from openrlhf.models import Actor
from openrlhf.models.ring_attn_utils import set_ring_attn_group
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer
from openrlhf.utils.deepspeed import DeepspeedStrategy
from openrlhf.utils.deepspeed import deepspeed as strategies
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from tests.forks import compile_nothing

__all__ = ["ActorPPOTrainer", "Strategy", "made", "set_ring_attn_group", "strategies", "without_cuda"]

V = 31


class _Cpu(str):
    """The current device's name, and its number where that is written into another name."""

    def __format__(self, _: str) -> str:
        return "0"


class Strategy(DeepspeedStrategy):
    """DeepSpeed with SGD, on gloo."""

    def setup_distributed(self, *args, **kwargs):
        compile_nothing()
        mesh = strategies.init_device_mesh
        with mock.patch.object(strategies, "init_device_mesh", lambda _, *more, **named: mesh("cpu", *more, **named)):
            super().setup_distributed(*args, **kwargs)

    def get_ds_train_config(self, *args, **kwargs):
        config = super().get_ds_train_config(*args, **kwargs)
        return config | {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "zero_allow_untested_optimizer": True}


def without_cuda():
    """A context in which the current device is the CPU."""
    cuda = {"current_device": lambda: _Cpu("cpu"), "synchronize": lambda *_: None, "set_device": lambda *_: None}
    return mock.patch.multiple(torch.cuda, **cuda)


def arguments(**options):
    """OpenRLHF's arguments, as its command line nests them."""
    given = {
        "packing": False,
        "dynamic": False,
        "batch": 8,
        "micro_batch": 4,
        "epochs": 1,
        "entropy": None,
        "kl": False,
        "loss": "ppo",
        "aggregation": "token-mean",
        "dual_clip": None,
        "stage": 2,
        "max_tokens": 40,
        "correction": "off",
        "aux": 0.0,
        "dtype": "fp32",
        "rows": 16,
    } | options
    of = SimpleNamespace
    return of(
        local_rank=-1,
        train=of(
            max_epochs=given["epochs"],
            dynamic_batch_enable=given["dynamic"],
            batch_size=given["batch"],
            micro_batch_size=given["micro_batch"],
            max_tokens_per_gpu=given["max_tokens"],
            colocate_all=False,
            async_enable=False,
        ),
        actor=of(
            eps_clip_low_high=(0.2, 0.2),
            dual_clip=given["dual_clip"],
            loss_agg_mode=given["aggregation"],
            policy_loss_type=given["loss"],
            aux_loss_coef=given["aux"],
            entropy_coef=given["entropy"],
        ),
        algo=of(
            advantage=of(
                is_correction_level=given["correction"],
                is_correction_mode="mask",
                is_correction_gating="ratio",
                is_correction_threshold=(0.5, 5.0),
            ),
            kl=of(use_loss=given["kl"], init_coef=0.1, estimator="k3", unbiased_gradient=False),
        ),
        ds=of(
            param_dtype=given["dtype"],
            packing_samples=given["packing"],
            tensor_parallel_size=1,
            ring_attn_size=1,
            zero_stage=given["stage"],
        ),
        rollout=of(batch_size=given["rows"], n_samples_per_prompt=1),
        vllm=of(sync_backend="gloo"),
    )


SIZES = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3, "use_cache": False}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def mixtral():
    """As the actor has it: its router's logits are returned, too."""
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True))


def made(trainer=ActorPPOTrainer, model=llama, max_norm=0.0, **options):
    """A trainer with its actor in a DeepSpeed engine, and experiences in its buffer."""
    args = arguments(**options)
    strategy = Strategy(
        micro_train_batch_size=args.train.micro_batch_size,
        train_batch_size=args.train.batch_size,
        zero_stage=args.ds.zero_stage,
        args=args,
    )
    strategy.setup_distributed()
    how = {"attn_implementation": "sdpa", "param_dtype": args.ds.param_dtype}
    actor = Actor(model(), packing_samples=args.ds.packing_samples, temperature=0.9, **how)
    actor.packing_samples = args.ds.packing_samples  # which it sets where it loads a model from a folder
    adam = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    prepared = strategy.prepare(
        (
            actor,
            {"optim": "adam", "adam": adam, "lr_scheduler": "constant", "max_norm": max_norm, "scheduler_steps": 10},
        )
    )
    made = trainer(
        strategy,
        prepared[0],
        None,
        prepared[1],
        prepared[2],
        micro_train_batch_size=args.train.micro_batch_size,
        dataloader_pin_memory=False,
    )
    made.replay_buffer.append(experiences(made.actor, args.rollout.batch_size, dist.get_rank()))
    return made


def experiences(actor, rows, seed=0, prompt=3, answer=7):
    """Prompts padded to the left and answers to the right, as OpenRLHF has them, of a policy near to the actor's."""
    g = torch.Generator().manual_seed(seed)
    total = prompt + answer
    sequences = torch.randint(3, V, (rows, total), generator=g)
    before, after = torch.randint(prompt, (rows, 1), generator=g), torch.randint(1, answer + 1, (rows, 1), generator=g)
    place = torch.arange(total)
    attends = (place >= before) & (place < prompt + after)
    acts = (place[None, 1:] >= prompt) & attends[:, 1:]
    with torch.no_grad():
        old = actor(sequences * attends, acts, attends.long()).float()
    old = (old + 0.1 * torch.randn(old.shape, generator=g)) * acts
    return Experience(
        sequences=sequences * attends,
        attention_mask=attends.long(),
        action_mask=acts,
        action_log_probs=old,
        base_action_log_probs=(old - 0.2) * acts,
        rollout_log_probs=(old + 0.1) * acts,
        advantages=torch.randn(rows, 1, generator=g) * acts,
        rewards=torch.randn(rows, generator=g),
        response_length=after[:, 0].float(),
        total_length=attends.sum(1).float(),
        info={"reward": torch.randn(rows, generator=g)},
    )
