"""TRL's trainers, one line and screen-first: parameters equal those of TRL with the terms of dropped rows masked."""

import dataclasses
import inspect
import math

import pytest
import torch
import trl
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

import kondo_hooks as kondo
from kondo_hooks.integrations.trl import KondoMixin
from tests import hf
from tests.masking import masking

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS, BATCH, RATE = 3, 8, 0.25
BASE = {**hf.TRAINING, "per_device_train_batch_size": BATCH}


def policy_trainer(kind, folder, *, model=None, **options):
    config = RLOOConfig if issubclass(kind, RLOOTrainer) else GRPOConfig
    mine = {name: options.pop(name) for name in ("kondo", "peft_config") if name in options}
    sizes = {"num_generations": 4, "max_completion_length": 6}
    missing = {*options} - {field.name for field in dataclasses.fields(config)}
    if missing:
        pytest.skip(f"this version of TRL has no {', '.join(sorted(missing))}")
    loss = options.get("loss_type")
    if loss and f'"{loss}"' not in inspect.getsource(GRPOTrainer):
        pytest.skip(f"this version of TRL has no loss {loss}")
    return kind(
        hf.saved(model or hf.llama(), folder),
        reward_funcs=hf.reward,
        args=config(str(folder), **{**BASE, **sizes, **options}),
        train_dataset=hf.prompts(),
        processing_class=hf.tokenizer(),
        **mine,
    )


def check_against_masked(kind, folder, gate_options=None, **options):
    trainer = policy_trainer(kind, folder, **options)
    start = hf.parameters(trainer)
    with kondo.gated(trainer.model, **gate_options or {"rate": RATE}) as gate:
        recorder = hf.Recorder(gate)
        trainer.add_callback(recorder)
        trainer.train()
    found = hf.parameters(trainer)
    reference = policy_trainer(masking(kind), folder, **options)
    reference.masks = recorder.masks(BATCH)
    reference.train()
    hf.assert_same(found, hf.parameters(reference), start)
    rows = BATCH * trainer.args.gradient_accumulation_steps
    assert [len(d.delight) for d in recorder.decisions] == [rows] * STEPS
    assert gate.stats.forwarded == gate.stats.kept
    assert gate_options or gate.stats.kept == STEPS * RATE * rows
    return trainer, reference, recorder


LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
VARIANTS = {
    "kl": {"beta": 0.1},
    "entropy": {"entropy_coef": 0.05},
    "iterations": {"num_iterations": 2, "beta": 0.05},
    "sequence": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "generation of two windows": {"steps_per_generation": 4},
    "accumulation of four": {"gradient_accumulation_steps": 4},
    "lora": {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_one_line_around_grpo(loss_type, tmp_path):
    check_against_masked(GRPOTrainer, tmp_path, loss_type=loss_type)


@pytest.mark.parametrize("name", VARIANTS)
def test_one_line_around_grpo_with(name, tmp_path):
    check_against_masked(GRPOTrainer, tmp_path, **VARIANTS[name])


LESS_USED = {
    "top entropy": {"top_entropy_quantile": 0.4},
    "top entropy and its bonus": {"top_entropy_quantile": 0.4, "entropy_coef": 0.05, "loss_type": "grpo"},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_target": 2.0},
    "sequence, dapo": {"importance_sampling_level": "sequence", "loss_type": "dapo", "num_iterations": 2},
    "sequence, luspo": {"importance_sampling_level": "sequence", "loss_type": "luspo", "num_iterations": 2},
    "delta": {"delta": 1.1, "num_iterations": 2, "loss_type": "dapo"},
    "off-policy mask": {"off_policy_mask_threshold": 0.01, "num_iterations": 2},
    "corrected kl": {"beta": 0.1, "use_bias_correction_kl": True, "num_iterations": 2},
    "truncated answers masked": {"mask_truncated_completions": True, "max_completion_length": 12},
    "padded to a multiple": {"pad_to_multiple_of": 8},
    "rewards unscaled": {"scale_rewards": "none"},
}


@pytest.mark.parametrize("name", LESS_USED)
def test_one_line_around_grpo_with_less_used(name, tmp_path):
    check_against_masked(GRPOTrainer, tmp_path, **LESS_USED[name])


LOGGED = ("loss", "grad_norm", "entropy", "kl", *(f"clip_ratio/{n}" for n in ("low_mean", "high_mean", "region_mean")))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_what_trl_logs_is_of_all_rows(loss_type, tmp_path):
    options = {"loss_type": loss_type, "num_iterations": 2, "beta": 0.05, "epsilon": 0.05}
    trainer, reference, _ = check_against_masked(GRPOTrainer, tmp_path, **options)
    clipped = 0
    for ours, theirs in zip(trainer.state.log_history[:STEPS], reference.state.log_history[:STEPS], strict=True):
        for name in LOGGED:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), name
        clipped += ours["clip_ratio/region_mean"]
    assert clipped > 0


WEIGHING = {
    "noise": {"noise": 0.5},
    "lossless": {"rate": "lossless"},
    "cppo": {"rule": kondo.rules.cppo(0.5), "groups": 4},
    "norm": {"rate": 0.5, "priority": "norm", "unbiased": True},
}


@pytest.mark.parametrize("name", WEIGHING)
def test_rules_that_weigh_around_grpo(name, tmp_path):
    trainer, _, recorder = check_against_masked(GRPOTrainer, tmp_path, WEIGHING[name], loss_type="dapo")
    if name != "lossless":  # all groups here have answers of several rewards
        assert any(len(decision.kept) < len(decision.delight) for decision in recorder.decisions)
    if name in ("noise", "norm"):
        assert "kondo/noise" in {key for entry in trainer.state.log_history for key in entry}


def test_one_line_around_rloo(tmp_path):
    check_against_masked(RLOOTrainer, tmp_path, beta=0.05)


def test_delight_is_advantage_times_surprisal_and_its_rows_are_the_generation(tmp_path):
    seen = []

    class Watching(GRPOTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            with torch.no_grad():
                logps, *_ = self._get_per_token_logps_and_entropies(
                    model,
                    torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
                    torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
                    inputs["completion_ids"].size(1),
                )
            seen.append(-(logps * inputs["completion_mask"]).sum(1) * inputs["advantages"])
            return super().compute_loss(model, inputs, **kwargs)

    trainer = policy_trainer(Watching, tmp_path)
    with kondo.gated(trainer.model, rate=RATE) as gate:
        recorder = hf.Recorder(gate)
        trainer.add_callback(recorder)
        trainer.train()
    for step, decision in enumerate(recorder.decisions):
        wanted = torch.cat(seen[2 * step : 2 * step + 2])
        torch.testing.assert_close(decision.delight, wanted, rtol=1e-4, atol=1e-4)
        assert set(decision.kept.tolist()) == set(wanted.topk(4).indices.tolist())


# Screen-first.


class ScreenFirst(KondoMixin, GRPOTrainer):
    pass


class ScreenFirstRloo(KondoMixin, RLOOTrainer):
    pass


def check_screen_first(kind, base, folder, gate_options=None, **options):
    masks, forwarded = [], []

    class Recording(kind):
        def compute_loss(self, model, inputs, **kwargs):
            masks.append(inputs["kondo_factors"].clone())
            before = self.kondo.gate.stats.forwarded
            loss = super().compute_loss(model, inputs, **kwargs)
            forwarded.append(self.kondo.gate.stats.forwarded - before)
            return loss

    trainer = policy_trainer(Recording, folder, kondo=gate_options or {"rate": RATE}, **options)
    start = hf.parameters(trainer)
    trainer.train()
    reference = policy_trainer(masking(base), folder, **options)
    reference.masks = iter(masks)
    reference.train()
    hf.assert_same(hf.parameters(trainer), hf.parameters(reference), start)
    assert forwarded == [max(1, int(mask.count_nonzero())) for mask in masks]
    assert trainer.kondo.gate is None and "_compiled_call_impl" not in vars(trainer.model)
    return trainer, reference, masks


@pytest.mark.parametrize("loss_type", LOSSES)
def test_screen_first_grpo(loss_type, tmp_path):
    check_screen_first(ScreenFirst, GRPOTrainer, tmp_path, loss_type=loss_type)


@pytest.mark.parametrize("name", ["noise", "cppo", "norm"])
def test_screen_first_grpo_by_rules_that_weigh(name, tmp_path):
    check_screen_first(ScreenFirst, GRPOTrainer, tmp_path, WEIGHING[name])


FIRST = VARIANTS | {name: options for name, options in LESS_USED.items() if "entropy" not in name}


@pytest.mark.parametrize("name", FIRST)
def test_screen_first_grpo_with(name, tmp_path):
    check_screen_first(ScreenFirst, GRPOTrainer, tmp_path, **FIRST[name])


def test_screen_first_rloo(tmp_path):
    check_screen_first(ScreenFirstRloo, RLOOTrainer, tmp_path, beta=0.05)


def test_screen_first_chooses_from_the_whole_generation_and_logs_what_trl_logs(tmp_path):
    trainer, reference, masks = check_screen_first(ScreenFirst, GRPOTrainer, tmp_path, steps_per_generation=4, beta=0.1)
    kept = [int(mask.sum()) for mask in masks]
    assert sum(kept[:4]) == RATE * 4 * BATCH and len(set(kept)) > 1
    logged, wanted = trainer.state.log_history, reference.state.log_history
    first, as_trl = logged[0], wanted[0]
    assert first["kondo/skipped"] == pytest.approx(1 - first["kondo/rate"], abs=0.2)
    for name in ("reward", "completions/mean_length", "clip_ratio/region_mean"):
        assert first[name] == pytest.approx(as_trl[name], abs=1e-5)
    assert all(
        math.isfinite(entry[name]) for entry in logged[:STEPS] for name in ("loss", "entropy", "kl", "grad_norm")
    )


def test_entropy_is_exact_where_a_pass_without_a_graph_was_needed_anyway(tmp_path):
    trainer, reference, _ = check_screen_first(ScreenFirst, GRPOTrainer, tmp_path)
    for ours, theirs in zip(trainer.state.log_history[:STEPS], reference.state.log_history[:STEPS], strict=True):
        assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-4)


def test_screen_first_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(ValueError, match="top_entropy_quantile < 1 needs"):
        policy_trainer(ScreenFirst, tmp_path, top_entropy_quantile=0.2)
    with pytest.raises(ValueError, match="whole answers"):
        policy_trainer(ScreenFirst, tmp_path, kondo={"unit": "token"})
    with pytest.raises(ValueError, match="rate must be"):
        policy_trainer(ScreenFirst, tmp_path, kondo={"rate": 2.0})
    trainer = policy_trainer(ScreenFirst, tmp_path)
    wrong = {"pixel_values": torch.zeros(3), "advantages": torch.zeros(3)}

    def generate(self, inputs):
        return wrong

    GRPOTrainer._generate_and_score_completions, before = generate, GRPOTrainer._generate_and_score_completions
    try:
        with pytest.raises(ValueError, match="images do not keep a sample a row"):
            trainer.train()
    finally:
        GRPOTrainer._generate_and_score_completions = before


def test_the_seams_are_there():
    for kind in (GRPOTrainer, RLOOTrainer):
        for name in ("_generate_and_score_completions", "_get_per_token_logps_and_entropies", "compute_loss"):
            assert callable(getattr(kind, name, None)), f"{kind.__name__}.{name} is gone: KondoMixin needs it"


# SFT and DPO.


def supervised(folder, **options):
    return SFTTrainer(
        hf.llama(),
        args=SFTConfig(str(folder), **{**BASE, **options}),
        train_dataset=hf.texts(),
        processing_class=hf.tokenizer(),
    )


def preferring(folder, **options):
    return DPOTrainer(
        hf.saved(hf.llama(), folder),
        args=DPOConfig(str(folder), **{**BASE, **options}),
        train_dataset=hf.preferences(),
        processing_class=hf.tokenizer(),
    )


def check_outputs_masked(make, folder, rows, spread=lambda mask: mask, **options):
    """Against the trainer itself with the gradient at the model's log-probs masked."""
    trainer = make(folder, **options)
    start = hf.parameters(trainer)
    with kondo.gated(trainer.model, rate=RATE) as gate:
        recorder = hf.Recorder(gate)
        trainer.add_callback(recorder)
        trainer.train()
    reference = make(folder, **options)
    masks = recorder.masks(rows)

    def masked(tensor, module):
        if torch.is_grad_enabled() and module.training:
            keep = spread(next(masks)).view(-1, *[1] * (tensor.dim() - 1))
            tensor = tensor.clone()
            tensor.register_hook(lambda grad: grad * keep)
        return tensor

    def mask_rows(module, args, output):
        output.log_probs = masked(output.log_probs, module)
        return output

    if hasattr(trl.trainer.utils, "add_fused_lm_head"):
        reference.model.register_forward_hook(mask_rows)
    else:  # before TRL 1.15 the model computes its logits, and maybe its loss
        reference.model.lm_head.register_forward_hook(lambda module, args, output: masked(output, module))
    reference.train()
    hf.assert_same(hf.parameters(trainer), hf.parameters(reference), start)
    return gate


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_one_line_around_sft(loss_type, tmp_path):
    gate = check_outputs_masked(supervised, tmp_path, BATCH, loss_type=loss_type)
    assert gate.stats.rows == STEPS * 2 * BATCH and gate.stats.skipped == 0.75


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_one_line_around_dpo_keeps_pairs(loss_type, tmp_path):
    gate = check_outputs_masked(
        preferring, tmp_path, BATCH, lambda mask: torch.cat([mask, mask]), loss_type=[loss_type]
    )
    assert gate.stats.rows == STEPS * 2 * BATCH  # pairs, not answers
    assert gate.stats.kept == gate.stats.forwarded == STEPS * 4
