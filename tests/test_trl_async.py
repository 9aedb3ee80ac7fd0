"""TRL's asynchronous GRPO: its own learner, fed by a queue; attention along a tree of texts in plain torch."""

import queue
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("trl.experimental.async_grpo", reason="TRL 1.16 or newer")
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

import kondo_hooks as kondo
from tests import hf
from tests.reference import Runs, told

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS, GROUP = 3, 4


def varlen(q, k, v, bounds_q, bounds_k, *_, softmax_scale, causal, window_size):
    """What TRL asks of its attention kernel: each run of queries sees its own keys, aligned at their ends."""
    assert causal and window_size == (-1, -1)
    found = []
    for i in range(len(bounds_q) - 1):
        queries, keys = slice(*bounds_q[i : i + 2].tolist()), slice(*bounds_k[i : i + 2].tolist())
        n, m = queries.stop - queries.start, keys.stop - keys.start
        sees = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        mine = (x.transpose(0, 1) for x in (q[queries], k[keys], v[keys]))
        found.append(F.scaled_dot_product_attention(*mine, sees, scale=softmax_scale, enable_gqa=True).transpose(0, 1))
    return torch.cat(found)


class NoServer:
    """In the place of vLLM: weights go nowhere."""

    def __init__(self, *_):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


class Worker:
    """A queue with answers in it."""

    def __init__(self, samples):
        self.rollout_buffer, self.metrics_queue = queue.Queue(), queue.Queue()
        for sample in samples:
            self.rollout_buffer.put(sample)

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def samples(count=96, shared=True):
    """Groups of answers to one prompt each, scored, from an older policy."""
    rng = np.random.default_rng(0)
    for group in range(count // GROUP):
        prompt = rng.integers(4, 16, 3)
        for i in range(GROUP):
            answer = rng.integers(4, 16, rng.integers(2, 7))
            prompt = prompt if shared else np.append(prompt[:-1], 4 + (GROUP * group + i) % 12)
            first = prompt if shared else np.append([4 + (GROUP * group + i) % 12], prompt)
            yield RolloutSample(
                prompt=[],
                completion=[],
                input_ids=np.concatenate([first, answer]),
                completion_mask=np.array([0] * len(first) + [1] * len(answer)),
                old_log_probs=np.concatenate([np.zeros(len(first)), rng.normal(-2.5, 0.3, len(answer))]).astype("f4"),
                advantage=float(rng.normal()),
                model_version=1,
                group_id=group,
                metrics={"reward": 0.0},
            )


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(packing, "_flash_attn", lambda: types.SimpleNamespace(flash_attn_varlen_func=varlen))
    monkeypatch.setattr(async_grpo_trainer, "VLLMClient", NoServer)
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: None)


def learner(folder, kind=AsyncGRPOTrainer, shared=True, **options):
    hf.llama().save_pretrained(folder)
    training = {name: value for name, value in hf.TRAINING.items() if name != "learning_rate"}
    sizes = {"per_device_train_batch_size": GROUP, "num_generations": GROUP, "token_budget": 0, "learning_rate": 0.1}
    return kind(
        str(folder),
        args=AsyncGRPOConfig(str(folder), **{**training, **sizes, **options}),
        train_dataset=hf.prompts(),
        processing_class=hf.tokenizer(),
        rollout_worker=Worker(samples(shared=shared)),
        weight_transfer=NoServer(),
    )


def train(folder, gate=None, **options):
    trainer = learner(folder, **options)
    start = hf.parameters(trainer)
    if gate is None:
        trainer.train()
        return trainer, start, None
    with kondo.gated(trainer.model, segments=False, **gate) as gated:
        recorder = hf.Recorder(gated)
        trainer.add_callback(recorder)
        trainer.train()
    return trainer, start, recorder


class Weighed(AsyncGRPOTrainer):
    """The loss terms of each text of each micro-batch, multiplied by factors that are known."""

    factors = ()

    def compute_loss(self, model, inputs, **kwargs):
        texts = inputs["segment_id"]
        mine = next(self.factors).to(inputs["advantages"])
        inputs["advantages"] = inputs["advantages"] * (mine if mine.dim() == 0 else mine[texts])
        return super().compute_loss(model, inputs, **kwargs)


METRICS = ("loss", "ratio", "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "grad_norm")


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("rule", [{"rate": 0.25}, {"noise": 0.7}], ids=told)
def test_a_row_of_texts_that_share_tokens_is_a_sample(rule, shared, tmp_path):
    """Texts of a row are a tree, in which none can be told from the others: a group of answers is kept or dropped."""
    options = {"shared": shared, "gradient_accumulation_steps": 4}
    trainer, start, recorder = train(tmp_path, rule, **options)
    reference = learner(tmp_path, Weighed, **options)
    reference.factors = (factor for decision in recorder.decisions for factor in decision.factors())
    reference.train()
    hf.assert_same(hf.parameters(trainer), hf.parameters(reference), start)
    assert recorder.gate.stats.rows == STEPS * 4 > recorder.gate.stats.kept == recorder.gate.stats.forwarded
    for ours, theirs in zip(trainer.state.log_history[:STEPS], reference.state.log_history[:STEPS], strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    plain = learner(tmp_path, **options)
    plain.train()
    first, as_trl = trainer.state.log_history[0], plain.state.log_history[0]
    for name in set(METRICS) - {"grad_norm"}:
        assert first[name] == pytest.approx(as_trl[name], rel=1e-4), name
    assert first["grad_norm"] != pytest.approx(as_trl["grad_norm"], rel=1e-2)


def recipe():
    """The code of the page."""
    page = (Path(__file__).parents[1] / "docs" / "frameworks" / "trl.md").read_text()
    found = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[1], found)
    return found


@pytest.mark.parametrize("budget", [0, 48])
def test_answers_chosen_before_they_are_packed(budget, tmp_path):
    found, factors = recipe(), []

    class Noting(kondo.Selector):
        def __call__(self, *args, **kwargs):
            decision = super().__call__(*args, **kwargs)
            factors.append(decision.factors())
            return decision

    kondo_of_page = types.SimpleNamespace(Selector=Noting, SelectionConfig=kondo.SelectionConfig)
    found["ScreenFirst"].get_train_dataloader.__globals__["kondo"] = kondo_of_page
    options = {"per_device_train_batch_size": 2 * GROUP, "token_budget": budget, "max_steps": STEPS}
    trainer = learner(tmp_path, found["ScreenFirst"], **options)
    start, runs = hf.parameters(trainer), Runs(trainer.model, hf.DIGITS + 4)
    trainer.train()
    reference = learner(tmp_path, Weighed, **options)
    every = Runs(reference.model, hf.DIGITS + 4)
    reference.factors = iter(factors)
    reference.train()
    hf.assert_same(hf.parameters(trainer), hf.parameters(reference), start)
    assert sum(runs.tokens) < 0.6 * sum(every.tokens)
    for ours, theirs in zip(trainer.state.log_history[:STEPS], reference.state.log_history[:STEPS], strict=True):
        for name in ("grad_norm", "reward", "batch/samples_per_row", "batch/trained_tokens_per_step"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


def test_a_micro_batch_of_which_nothing_is_kept_has_a_gradient_of_zero(tmp_path):
    found = recipe()
    never = types.SimpleNamespace(Selector=kondo.Selector, SelectionConfig=lambda **_: kondo.SelectionConfig(price=1e6))
    found["ScreenFirst"].get_train_dataloader.__globals__["kondo"] = never
    trainer = learner(tmp_path, found["ScreenFirst"])
    start = hf.parameters(trainer)
    trainer.train()
    assert all(torch.equal(value, start[name]) for name, value in hf.parameters(trainer).items())


def test_a_tree_that_is_taken_for_a_pack_is_an_error(tmp_path):
    trainer = learner(tmp_path, shared=False)
    with pytest.raises(kondo.ReplayMismatchError, match="failed in the model"), kondo.gated(trainer.model, rate=0.5):
        trainer.train()
