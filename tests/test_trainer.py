"""transformers' Trainer: one line, or the callback; against the same Trainer with dropped rows' gradients masked."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS

import kondo_hooks as kondo
from kondo_hooks.integrations.transformers import KondoCallback
from tests import hf
from tests.ranks.launch import launch

pytestmark = pytest.mark.filterwarnings("ignore")
BATCH, STEPS, RATE = 4, 3, 0.25
BASE = {**hf.TRAINING, "per_device_train_batch_size": BATCH}


def make(folder, model=None, callbacks=None, data=None, **options):
    args = TrainingArguments(str(folder), **{**BASE, **options})
    data = data or hf.rows()
    return Trainer(model or hf.llama(), args, hf.pad, train_dataset=data, eval_dataset=data[:8], callbacks=callbacks)


def run_gated(trainer, **options):
    with kondo.gated(trainer.model, **options or {"rate": RATE}) as gate:
        recorder = hf.Recorder(gate)
        trainer.add_callback(recorder)
        trainer.train()
    return gate, recorder


def lora():
    torch.manual_seed(0)
    return get_peft_model(hf.llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


SET_UPS = {
    "fp32": {},
    "no accumulation": {"gradient_accumulation_steps": 1},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "clipped": {"max_grad_norm": 0.5},
    "a last window that is short": {"gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 1},
}


@pytest.mark.parametrize("name", SET_UPS)
@pytest.mark.parametrize("build", [hf.llama, lora], ids=["full", "lora"])
def test_one_line(build, name, tmp_path):
    options = dict(SET_UPS[name])
    data = hf.rows(32) if name.startswith("a last") else None
    if build is lora and options.get("gradient_checkpointing"):
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    trainer = make(tmp_path, build(), data=data, **options)
    start = hf.parameters(trainer)
    gate, recorder = run_gated(trainer)
    options.pop("torch_compile", None), options.pop("torch_compile_backend", None)
    reference = make(tmp_path, build(), data=data, **options)
    hf.mask_head(reference, recorder.masks(BATCH))
    reference.train()
    hf.assert_same(hf.parameters(trainer), hf.parameters(reference), start, 2e-2 if name == "bf16" else 2e-5)
    sizes = [len(d.delight) for d in recorder.decisions]
    window = BATCH * trainer.args.gradient_accumulation_steps
    short = [12, 12, 8][: trainer.state.global_step]  # older versions leave an incomplete accumulation out
    assert sizes == (short if name.startswith("a last") else [window] * STEPS)
    assert gate.stats.kept == gate.stats.forwarded == sum(round(RATE * n) for n in sizes)
    assert not any("_compiled_call_impl" in vars(module) for module in trainer.model.modules())
    assert "_loss_function" not in vars(trainer.model)


def test_a_draw_by_norm_weighs_what_it_keeps(tmp_path):
    trainer = make(tmp_path)
    start = hf.parameters(trainer)
    gate, recorder = run_gated(trainer, noise=0.5)
    reference = make(tmp_path)
    hf.mask_head(reference, recorder.masks(BATCH))
    reference.train()
    hf.assert_same(hf.parameters(trainer), hf.parameters(reference), start)
    assert 0 < gate.stats.kept < gate.stats.rows and gate.stats.noise > 0


def test_sequence_classification(tmp_path):
    torch.manual_seed(0)

    def build():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(hf.llama(num_labels=3).config)

    data = [{**row, "labels": i % 3} for i, row in enumerate(hf.rows())]
    trainer = make(tmp_path, build(), data=data)
    start = hf.parameters(trainer)
    _, recorder = run_gated(trainer)
    reference = make(tmp_path, build(), data=data)
    hf.mask_head(reference, recorder.masks(BATCH), lambda model: model.score)
    reference.train()
    hf.assert_same(hf.parameters(trainer), hf.parameters(reference), start)


class Reporter(TrainerCallback):
    """Stands for tensorboard, wandb, trackio: sees logs as those do."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


METRICS = {f"kondo/{name}" for name in ("rate", "kept", "skipped", "price", "delight_kept", "delight_dropped")}


def test_callback_alone_is_the_one_line(tmp_path):
    trainer = make(tmp_path)
    start = hf.parameters(trainer)
    _, recorder = run_gated(trainer)
    alone = hf.Recorder(rate=RATE)
    other = make(tmp_path, callbacks=[alone])
    other.train()
    assert alone.kept() == recorder.kept() and alone.gate is None
    hf.assert_same(hf.parameters(other), hf.parameters(trainer), start, 0)
    assert trainer.state.log_history[0].keys() >= METRICS


@pytest.mark.parametrize("alone", [True, False])
def test_metrics_reach_whoever_reports(alone, tmp_path):
    reporter = Reporter()
    trainer = make(tmp_path, callbacks=[reporter, *([KondoCallback(rate=RATE)] if alone else [])])
    if alone:
        trainer.train()
    else:
        with kondo.gated(trainer.model, rate=RATE):
            trainer.train()
    assert len(reporter.seen) == STEPS + 1
    for logs, entry in zip(reporter.seen[:STEPS], trainer.state.log_history, strict=False):
        assert logs.keys() >= METRICS and entry.keys() >= METRICS
        assert logs["kondo/rate"] == RATE and logs["kondo/kept"] == 2 and logs["kondo/skipped"] == 1 - RATE
        assert logs["kondo/delight_kept"] >= logs["kondo/price"] >= logs["kondo/delight_dropped"]
    assert not any(name.startswith("kondo") for name in reporter.seen[-1])  # the summary of the run
    assert not any(isinstance(c, KondoCallback) for c in trainer.callback_handler.callbacks) or alone


def test_schedules_by_step_and_by_epoch(tmp_path):
    by_step = hf.Recorder(rate=lambda state: 0.5 if state.global_step < 2 else 0.25)
    make(tmp_path, callbacks=[by_step]).train()
    assert [len(d.kept) for d in by_step.decisions] == [4, 4, 2]
    by_epoch = hf.Recorder(rate=lambda state: 0.25 * (1 + int(state.epoch)))
    make(tmp_path, callbacks=[by_epoch], data=hf.rows(16), max_steps=-1, num_train_epochs=2).train()
    assert [len(d.kept) for d in by_epoch.decisions] == [2, 2, 4, 4]


def test_evaluation_is_not_gated(tmp_path):
    trainer = make(tmp_path, eval_strategy="steps", eval_steps=1)
    gate, _ = run_gated(trainer)
    assert gate.stats.rows == STEPS * 2 * BATCH
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == STEPS
    assert losses[-1] == pytest.approx(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("alone", [True, False])
def test_resume_takes_the_decisions_of_a_run_that_went_on(alone, tmp_path):
    def run(folder, steps, resume=None):
        # Decisions that depend on the past: random numbers, and a price from earlier ones.
        options = {"rate": RATE, "deterministic": False, "temperature": 5.0, "history": 3}
        trainer = make(folder, max_steps=steps, save_strategy="steps", save_steps=3, ignore_data_skip=False)
        if alone:
            recorder = hf.Recorder(**options)
            trainer.add_callback(recorder)
            trainer.train(resume_from_checkpoint=resume)
        else:
            with kondo.gated(trainer.model, **options) as gate:
                recorder = hf.Recorder(gate)
                trainer.add_callback(recorder)
                trainer.train(resume_from_checkpoint=resume)
        return trainer, recorder

    whole, wanted = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    assert (tmp_path / "parts" / "checkpoint-3" / "kondo_gate_0.pt").is_file()
    resumed, found = run(tmp_path / "parts", 6, resume=True)
    assert found.kept() == wanted.kept()[3:]
    assert len({len(kept) for kept in wanted.kept()}) > 1
    start = {name: p.detach() for name, p in hf.llama().named_parameters()}
    hf.assert_same(hf.parameters(resumed), hf.parameters(whole), start, 1e-6)


def test_resume_without_the_gates_state_says_so(tmp_path):
    make(tmp_path, save_strategy="steps", save_steps=3).train()
    trainer = make(tmp_path, callbacks=[KondoCallback(rate=RATE)], max_steps=4)
    with pytest.warns(kondo.KondoWarning, match="no gate's state in"):
        trainer.train(resume_from_checkpoint=True)


def test_an_error_in_training_leaves_nothing_behind(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise KeyboardInterrupt

    trainer = make(tmp_path, callbacks=[stop := Stop()])
    before = list(trainer.callback_handler.callbacks)
    with pytest.raises(KeyboardInterrupt), kondo.gated(trainer.model, rate=RATE):
        trainer.train()
    assert trainer.callback_handler.callbacks == before
    assert "_compiled_call_impl" not in vars(trainer.model)

    alone = KondoCallback(rate=RATE)
    trainer.add_callback(alone)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stop)
    trainer.train()  # takes the old gate off and opens its own
    assert "_compiled_call_impl" not in vars(trainer.model) and alone.gate is None


@pytest.mark.parametrize("where", ["data", "a callback", "evaluation"])
def test_an_error_outside_of_a_step_leaves_no_gate(where, tmp_path):
    class Failing(TrainerCallback):
        def on_step_end(self, *_, **__):
            if where == "a callback":
                raise ZeroDivisionError

        def on_evaluate(self, *_, **__):
            raise ZeroDivisionError

    class Rows(list):
        def __getitem__(self, i):
            if where == "data" and not isinstance(i, slice):
                raise ZeroDivisionError
            return super().__getitem__(i)

    options = {"eval_strategy": "steps", "eval_steps": 1} if where == "evaluation" else {}
    callback = KondoCallback(rate=RATE)
    trainer = make(tmp_path, callbacks=[callback, Failing()], data=Rows(hf.rows()), **options)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert callback.gate is None
    assert not any("_compiled_call_impl" in vars(module) for module in trainer.model.modules())


@pytest.mark.parametrize("scope", ["made inside", "made inside beside others"])
def test_a_trainer_that_is_made_in_the_context_adopts_its_gate(scope, tmp_path):
    model, before = hf.llama(), list(DEFAULT_CALLBACKS)
    with kondo.gated(model, rate=RATE) as gate:
        others = [make(tmp_path / "other", hf.llama())] if "beside" in scope else []
        trainer = make(tmp_path, model)
        start = hf.parameters(trainer)
        recorder = hf.Recorder(gate)
        trainer.add_callback(recorder)
        for each in [*others, trainer]:
            each.train()
    assert list(DEFAULT_CALLBACKS) == before
    for each in [*others, trainer]:
        kinds = [type(callback).__name__ for callback in each.callback_handler.callbacks]
        assert "_Newcomers" not in kinds and "KondoCallback" not in kinds
    assert [len(decision.delight) for decision in recorder.decisions] == [2 * BATCH] * STEPS  # one accumulation each
    assert all("kondo/kept" in log for log in trainer.state.log_history if "loss" in log)
    reference = make(tmp_path)
    hf.mask_head(reference, recorder.masks(BATCH))
    reference.train()
    hf.assert_same(hf.parameters(trainer), hf.parameters(reference), start)
    assert all(not any("kondo" in name for log in each.state.log_history for name in log) for each in others)


def test_the_callback_gates_the_trainer_that_trains(tmp_path):
    alone = hf.Recorder(rate=RATE)
    first, second = make(tmp_path / "a", callbacks=[alone]), make(tmp_path / "b", callbacks=[alone])
    first.train()
    second.train()
    assert [len(kept) for kept in alone.kept()] == [2] * 2 * STEPS
    assert second.state.log_history[0]["kondo/kept"] == 2


def test_training_twice(tmp_path):
    trainer = make(tmp_path)
    with kondo.gated(trainer.model, rate=RATE) as gate:
        trainer.train()
        trainer.train()
    assert gate.stats.steps == 2 * STEPS
    with kondo.gated(trainer.model, rate=RATE, window=1) as gate:
        trainer.train()
    assert gate.stats.steps == 2 * STEPS  # what the user says stands: a decision each micro-batch


def test_other_models_are_not_adopted(tmp_path):
    trainer = make(tmp_path)
    before = list(trainer.callback_handler.callbacks)
    with kondo.gated(hf.llama(), rate=RATE, enabled=True) as gate:
        assert trainer.callback_handler.callbacks == before
        assert gate._step.window.size == 1
        gate.model(
            input_ids=torch.ones(4, 3, dtype=torch.long), labels=torch.ones(4, 3, dtype=torch.long)
        ).loss.backward()


def test_bad_arguments(tmp_path):
    gate = kondo.gated(hf.llama(), rate=RATE)
    with pytest.raises(ValueError, match="a gate, or what to make one of"):
        KondoCallback(gate, rate=0.1)
    with pytest.raises(ValueError, match="rate must be"):
        KondoCallback(rate=1.5)
    with pytest.raises(ValueError, match="rate must be"):
        (trainer := make(tmp_path, callbacks=[KondoCallback(rate=lambda state: 2.0)])).train()
    assert "_compiled_call_impl" not in vars(trainer.model) and "training_step" not in vars(trainer)
    assert torch._C._len_torch_function_stack() == 0
    with pytest.raises(TypeError, match="no_such_option"):
        KondoCallback(rate=0.1, no_such_option=1)


def test_the_seams_are_there(tmp_path):
    trainer = make(tmp_path)
    assert trainer.model_wrapped is trainer.model
    assert isinstance(trainer.callback_handler.callbacks, list)
    assert callable(type(trainer.model).loss_function.fset)


# On two ranks.


@pytest.mark.parametrize("host", ["ddp", "ddp checkpointing", "fsdp1", "fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize(("how", "scope"), [("with", "local"), ("callback", "global")])
@pytest.mark.slow
def test_one_line_on_two_ranks(host, how, scope):
    engine = {"d": "DistributedDataParallel", "z": "DeepSpeed"}.get(host[0])
    engine = engine or {"1": "FullyShardedDataParallel", "2": "fully_shard"}[host[-1]]
    found = launch("tests.ranks.trainers", 2, ["sft", host, how, scope], 200)
    for rank in found:
        assert rank["engine"] == engine
        assert rank["apart"] < 2e-5 and rank["moved"] > 1e-3
        assert rank["rows"] == [2 * BATCH] * STEPS
    assert sum(n for rank in found for n in rank["kept"]) == STEPS * 4
    assert set(found[0]["logged"]) == METRICS


POLICIES = [
    ("ddp", "grpo", "with"),
    ("ddp", "grpo", "screen-first"),
    ("ddp", "rloo", "screen-first"),
    ("fsdp2", "grpo", "with"),
    ("zero2", "grpo", "screen-first"),
    ("zero3", "grpo", "with"),
]


@pytest.mark.parametrize(("host", "kind", "how"), POLICIES)
@pytest.mark.slow
def test_policy_trainers_on_two_ranks(host, kind, how):
    found = launch("tests.ranks.trainers", 2, ["policy", host, kind, how], 200)
    for rank in found:
        assert rank["apart"] < 2e-5 and rank["moved"] > 1e-3 and rank["finite"]
        assert sum(rank["kept"]) > 0
        if how == "screen-first":
            assert rank["forwarded"] == [max(1, kept) for kept in rank["kept"]]
