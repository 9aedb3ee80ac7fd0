"""TRL's packed rows: the texts are the samples. Parameters equal TRL's with the log-probs of dropped texts masked."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import kondo_hooks as kondo
from tests import hf
from tests.reference import Runs, told

pytest.importorskip("trl", minversion="1.16", reason="what TRL 1.16 gives the model with packed rows")
pytestmark = pytest.mark.filterwarnings("ignore")
STEPS, RATE = 3, 0.25
PACKINGS = {
    "padding-free": {"padding_free": True, "max_length": None},
    "bfd": {"packing": True, "packing_strategy": "bfd", "max_length": 12},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 12},
}


def supervised(folder, attention="sdpa", kind=SFTTrainer, peft_config=None, **options):
    return kind(
        hf.llama(attn_implementation=attention),
        args=SFTConfig(str(folder), **{**hf.TRAINING, "per_device_train_batch_size": 4, **options}),
        train_dataset=hf.texts(),
        processing_class=hf.tokenizer(),
        peft_config=peft_config,
    )


def mask_texts(model, factors):
    """Multiply the gradient at the log-probs of each text by its factor, call by call."""

    def weigh(module, args, kwargs, output):
        if torch.is_grad_enabled() and module.training:
            ids = kwargs["seq_idx"][0]
            mine = factors[: int(ids.max()) + 1]
            del factors[: len(mine)]
            keep = torch.stack(mine)[ids[:-1]]
            output.log_probs.register_hook(lambda grad: grad * keep)
        return output

    model.register_forward_hook(weigh, with_kwargs=True)


def logged(trainer, names):
    return [{name: entry[name] for name in names} for entry in trainer.state.log_history[:STEPS]]


def check_against_masked(make, options=None):
    trainer = make()
    start = hf.parameters(trainer)
    runs = Runs(trainer.model, hf.DIGITS + 4)
    with kondo.gated(trainer.model, **options or {"rate": RATE}) as gate:
        recorder = hf.Recorder(gate)
        trainer.add_callback(recorder)
        trainer.train()
    found = hf.parameters(trainer)
    reference = make()
    every = Runs(reference.model, hf.DIGITS + 4)
    mask_texts(reference.model, [factor for decision in recorder.decisions for factor in decision.factors()])
    reference.train()
    hf.assert_same(found, hf.parameters(reference), start)
    return trainer, reference, gate, sum(runs.tokens), sum(every.tokens)


def difference(trainer, other):
    mine, others = hf.parameters(trainer), hf.parameters(other)
    return max((mine[name] - others[name]).abs().max() for name in mine)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_the_texts_of_a_pack_are_the_samples(packing, attention, tmp_path):
    trainer, reference, gate, run, every = check_against_masked(
        lambda: supervised(tmp_path, attention, **PACKINGS[packing])
    )
    assert gate.stats.rows >= STEPS * 8 and gate.stats.kept <= 0.3 * gate.stats.rows
    assert gate.stats.forwarded == gate.stats.kept and run < 0.7 * every
    full = supervised(tmp_path, attention, **PACKINGS[packing])
    full.train()
    assert difference(trainer, full) > 100 * difference(trainer, reference)


VARIANTS = {
    "dft": {"loss_type": "dft"},
    "checkpointing": {"gradient_checkpointing": True},
    "padded to a multiple": {"pad_to_multiple_of": 16},
    "lora": {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")},
    "other lengths": {"max_length": 20, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_sft_with(name, tmp_path):
    options = {**PACKINGS["bfd"], **VARIANTS[name]}
    _, _, gate, run, every = check_against_masked(lambda: supervised(tmp_path, **options))
    assert gate.stats.kept < gate.stats.rows and run < every


@pytest.mark.parametrize("options", [{"noise": 0.7}, {"rate": 0.25, "priority": "uniform"}, {"price": 15.0}], ids=told)
def test_packed_sft_by_rules(options, tmp_path):
    _, _, gate, run, every = check_against_masked(lambda: supervised(tmp_path, **PACKINGS["bfd"]), options)
    assert 0 < gate.stats.kept < gate.stats.rows and run < 1.2 * every


def test_what_trl_logs_is_of_all_texts(tmp_path):
    trainer, reference, *_ = check_against_masked(lambda: supervised(tmp_path, **PACKINGS["bfd"]))
    names = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm")
    for ours, theirs in zip(logged(trainer, names), logged(reference, names), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert "kondo/skipped" in trainer.state.log_history[0]


def test_texts_that_the_strategy_wraps_over_rows_are_no_samples(tmp_path):
    """It cuts texts anywhere and lets those of a row see each other: there the rows are the samples."""
    options = {"packing": True, "packing_strategy": "wrapped", "max_length": 8}
    trainer = supervised(tmp_path, **options)
    start = hf.parameters(trainer)
    with kondo.gated(trainer.model, rate=RATE) as gate:
        recorder = hf.Recorder(gate)
        trainer.add_callback(recorder)
        trainer.train()
    reference = supervised(tmp_path, **options)
    masks = recorder.masks(4)

    def weigh(module, args, output):
        if torch.is_grad_enabled() and module.training:
            keep = next(masks)[:, None]
            output.log_probs.register_hook(lambda grad: grad * keep)

    reference.model.register_forward_hook(weigh)
    reference.train()
    hf.assert_same(hf.parameters(trainer), hf.parameters(reference), start)
    assert gate.stats.rows == STEPS * 8 and gate.stats.kept == STEPS * 2


def test_padding_free_rows_that_are_given_a_mask_are_refused(tmp_path):
    """An attention_mask makes the texts of a row see each other, which TRL leaves away."""

    class WithMask(SFTTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            return super().compute_loss(model, inputs, **kwargs)

    trainer = supervised(tmp_path, kind=WithMask, **PACKINGS["bfd"])
    with pytest.raises(Exception, match="texts of one row see each other"), kondo.gated(trainer.model, rate=RATE):
        trainer.train()


def test_the_page_runs_as_it_stands(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "frameworks" / "trl.md").read_text()
    common = {**hf.TRAINING, "per_device_train_batch_size": 4, "output_dir": str(tmp_path)}
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0].replace('"out", ', "")
    found = {"model": hf.llama(), "texts": hf.texts(), "tokenizer": hf.tokenizer(), "common": common}
    start = [p.detach().clone() for p in found["model"].parameters()]
    exec(code, found)
    assert any(not torch.equal(a, b) for a, b in zip(start, found["model"].parameters(), strict=True))
    assert found["trainer"].state.log_history[0]["kondo/skipped"] > 0.5
