"""The PPO and DPO recipes of a single device."""

import tempfile
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torchtune import config

import kondo_hooks as kondo
from tests.frameworks.torchtune.grpo import HERE, MODELS, SIZES, configured
from tests.frameworks.torchtune.parts import VOCABULARY, load_recipe, masked
from tests.reference import Runs

VALUE = {"_component_": "torchtune.models.llama2.llama2_classifier", "num_classes": 1, **SIZES, "intermediate_dim": 24}
LORA = {
    "_component_": "torchtune.models.llama3.lora_llama3",
    "lora_attn_modules": ["q_proj", "v_proj"],
    "lora_rank": 2,
    "lora_alpha": 4.0,
    "apply_lora_to_mlp": False,
    **SIZES,
    "intermediate_dim": 24,
}


def ppo(folder):
    """The recipe, set up: 8 answers a step, two passes over minibatches of two backwards."""
    torch.manual_seed(1)
    Path(folder, "value").mkdir()
    torch.save(config.instantiate(OmegaConf.create(VALUE)).double().state_dict(), Path(folder, "value", "model.pt"))
    values = {
        "policy_model": MODELS["llama3"],
        "reward_and_value_model": VALUE,
        "loss": {"_component_": "torchtune.rlhf.loss.PPOLoss", "epsilon": 0.2},
        "optimizer_in_bwd": False,
        "enable_activation_checkpointing": False,
        "gradient_accumulation_steps": 2,
        "ppo_batch_size": 8,
        "batch_size": 8,
        "forward_batch_size": 8,
        "num_steps": 16,
        "kl_coeff": 0.01,
        "gamma": 1.0,
        "lmbda": 0.95,
        "whiten_rewards": False,
        "min_response_length": 2,
        "penalise_no_eos": False,
        "reward_penalty": -3,
        "enable_kv_cache": True,
        "dataset": {"_component_": f"{HERE}.queries"},
    }
    cfg = configured(folder, model="llama3", **values)
    cfg.ref_policy_checkpointer = cfg.checkpointer
    cfg.value_checkpointer = {**cfg.checkpointer, "checkpoint_dir": str(Path(folder, "value")), "model_type": "REWARD"}
    cfg.reward_checkpointer = cfg.value_checkpointer
    found = load_recipe("ppo_full_finetune_single_device.py").PPOFullFinetuneRecipeSingleDevice(cfg=cfg)
    found.setup(cfg=cfg)
    return found, found._policy_model


def dpo(folder):
    """The recipe, set up: four pairs of answers a micro-batch, two of these a step."""
    values = {
        "model": "llama3",
        "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.5},
        "dataset": {"_component_": f"{HERE}.preferences"},
        "enable_activation_checkpointing": False,
        "gradient_accumulation_steps": 2,
        "max_steps_per_epoch": 2,
        "batch_size": 4,
    }
    cfg = configured(folder, **values)
    cfg.model = LORA
    found = load_recipe("lora_dpo_single_device.py").LoRADPORecipeSingleDevice(cfg=cfg)
    found.setup(cfg=cfg)
    return found, found._model


RECIPES = {"ppo": ppo, "dpo": dpo}


def main(name, rule=None, masks=None):
    """Train gated by a rule, or with the gradients of the rows' log-probs masked, or as the recipe is."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, model = RECIPES[name](folder)
        recipe.save_checkpoint = lambda *_, **__: None
        everything = [*recipe._optimizer.param_groups[0]["params"]]
        start, decided, loss = [p.detach().clone() for p in everything], [], recipe._loss_fn
        runs = Runs(model, VOCABULARY)
        left = iter(masks or ())

        def masked_loss(*args, **named):
            args = list(args)
            if masks is not None:
                factors = next(left)
                for i in (1,) if name == "ppo" else (0, 1):  # the policy's log-probs
                    args[i] = masked(args[i], factors)
            return loss(*args, **named)

        recipe._loss_fn = masked_loss
        with kondo.gated(model, enabled=rule is not None, **(rule or {})) as gate:
            recipe._optimizer.register_step_post_hook(
                lambda *_: decided.append(gate.last.factors() if rule is not None else None)
            )
            recipe.train()
        end = [p.detach().clone() for p in everything]
        return {"start": start, "end": end, "decided": decided, "stats": gate.stats, "tokens": sum(runs.tokens)}
