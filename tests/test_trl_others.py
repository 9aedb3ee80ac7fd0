"""TRL's other trainers, with one line: parameters equal those of TRL with the gradient of dropped rows masked."""

import pytest
import torch
from datasets import Dataset

pytest.importorskip("trl", minversion="1.16", reason="the experimental trainers of TRL 1.16")
from trl import KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import kondo_hooks as kondo
from tests import hf
from tests.masking import masking

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS, BATCH, RATE = 3, 8, 0.25
BASE = {**hf.TRAINING, "per_device_train_batch_size": BATCH, "learning_rate": 0.1}


def unpaired():
    found = hf.preferences()
    answers = [c if i % 2 else r for i, (c, r) in enumerate(zip(found["chosen"], found["rejected"], strict=True))]
    return Dataset.from_dict(
        {"prompt": found["prompt"], "completion": answers, "label": [i % 2 == 1 for i in range(32)]}
    )


def kto(folder, **options):
    return KTOTrainer(
        hf.saved(hf.llama(), folder),
        args=KTOConfig(str(folder), **{**BASE, **options}),
        train_dataset=unpaired(),
        processing_class=hf.tokenizer(),
    )


def of_pairs(kind, config):
    def make(folder, **options):
        return kind(
            hf.llama(),
            args=config(str(folder), max_length=24, **{**BASE, **options}),
            train_dataset=hf.preferences(),
            processing_class=hf.tokenizer(),
        )

    return make


MAKERS = {"kto": kto, "cpo": of_pairs(CPOTrainer, CPOConfig), "orpo": of_pairs(ORPOTrainer, ORPOConfig)}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kto", {}),
        ("kto", {"loss_type": "apo_zero_unpaired"}),
        ("cpo", {}),
        ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}),
        ("orpo", {}),
    ],
)
def test_one_line_around(name, options, tmp_path):
    trainer = MAKERS[name](tmp_path, **options)
    start = hf.parameters(trainer)
    with kondo.gated(trainer.model, rate=RATE) as gate:
        recorder = hf.Recorder(gate)
        trainer.add_callback(recorder)
        trainer.train()
    reference = MAKERS[name](tmp_path, **options)
    masks = recorder.masks(BATCH)

    def weigh(module, args, output):
        if torch.is_grad_enabled() and module.training:
            keep = next(masks)
            tensor = output.log_probs if getattr(output, "log_probs", None) is not None else output.logits
            keep = keep.repeat(len(tensor) // BATCH).view(-1, *[1] * (tensor.dim() - 1))
            tensor.register_hook(lambda grad: grad * keep)

    reference.model.register_forward_hook(weigh)
    reference.train()
    hf.assert_same(hf.parameters(trainer), hf.parameters(reference), start)
    assert gate.stats.rows == STEPS * 2 * BATCH and gate.stats.kept == gate.stats.forwarded == STEPS * 4


def test_one_line_around_gmpo(tmp_path):
    def make(kind):
        return kind(
            hf.saved(hf.llama(), tmp_path),
            reward_funcs=hf.reward,
            args=GMPOConfig(str(tmp_path), num_generations=4, max_completion_length=6, num_iterations=2, **BASE),
            train_dataset=hf.prompts(),
            processing_class=hf.tokenizer(),
        )

    trainer = make(GMPOTrainer)
    start = hf.parameters(trainer)
    with kondo.gated(trainer.model, rate=RATE) as gate:
        recorder = hf.Recorder(gate)
        trainer.add_callback(recorder)
        trainer.train()
    reference = make(masking(GMPOTrainer))
    reference.masks = recorder.masks(BATCH)
    reference.train()
    hf.assert_same(hf.parameters(trainer), hf.parameters(reference), start)
    assert gate.stats.kept == gate.stats.forwarded == STEPS * 4
