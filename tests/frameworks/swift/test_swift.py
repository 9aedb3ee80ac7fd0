"""ms-swift's own GRPO loss, gated, and with the gradients of dropped rows masked."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("swift", reason="make frameworks ONLY=swift")

import kondo_hooks as kondo
from tests.frameworks.swift.trainer import Trainer, V, batch, llama
from tests.reference import Runs, copies, grads, largest_relative_difference

PAGE = Path(__file__).parents[3] / "docs/frameworks/swift.md"
LOSSES = {
    "grpo": {},
    "kl": {"beta": 0.1},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "gspo": {"importance_sampling_level": "sequence"},
    "gspo, tokens": {"importance_sampling_level": "sequence_token"},
    "entropy": {"compute_entropy": True},
}


def known(model, padding_free, seed=0):
    """A batch with the old policy's log-probs, and a reference's."""
    given = batch(padding_free=padding_free, seed=seed)
    old = Trainer(model, padding_free, model_kwarg_keys={"use_cache"}).log_probs(given)
    near = old + 0.1 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1), dtype=old.dtype)
    given["grpo_batch"].old_per_token_logps, given["grpo_batch"].ref_per_token_logps = near, old - 0.2
    return given


def prepared(trainer):
    """With the line of the page that packed rows need."""
    if trainer.template.padding_free:
        exec(PAGE.read_text().split("```python\n")[1].split("```")[0].splitlines()[2], {"trainer": trainer})
    return trainer


@pytest.mark.filterwarnings("ignore::kondo_hooks.KondoWarning")
@pytest.mark.parametrize("first", [False, True], ids=["screened", "decided first"])
@pytest.mark.parametrize("rule", [{"rate": 0.34}, {"noise": 0.7}], ids=str)
@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding_free"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_that_of_the_masked_loss(loss, padding_free, rule, first):
    ours, theirs = copies(llama().train())
    given = known(ours, padding_free)
    trainer = prepared(Trainer(ours, padding_free, **LOSSES[loss]))
    assert ("logits_to_keep" in trainer.model_kwarg_keys) is not padding_free
    runs, known_of = Runs(ours, V), given["grpo_batch"]
    with kondo.gated(ours, **rule) as gate:
        if first:
            gate.preselect(known_of.old_per_token_logps, known_of.advantages, known_of.completion_mask)
        value, logged = trainer.loss(given)
        value.backward()
    factors = gate.last.factors()
    reference = Trainer(theirs, padding_free, model_kwarg_keys={"use_cache"}, **LOSSES[loss])
    expected, everything = reference.loss(given, factors)
    expected.backward()
    masked = grads(theirs)
    assert largest_relative_difference(grads(ours), masked) < 1e-10
    theirs.zero_grad()
    reference.loss(given)[0].backward()
    assert largest_relative_difference(grads(theirs), masked) > 1e-2
    assert 0 < factors.count_nonzero() < len(factors)
    kept = (
        given["model_inputs"]["input_ids"].numel()
        if not padding_free
        else int((known_of.seq_lengths * (factors != 0)).sum())
    )
    assert any(n <= kept for n in runs.tokens) and min(runs.tokens) < given["model_inputs"]["input_ids"].numel()
    if not first:
        assert value.item() == pytest.approx(expected.item(), rel=1e-12)
        for name in {"clipping", "kl"} & {*logged}:
            assert logged[name] == pytest.approx(everything[name], rel=1e-9)


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding_free"])
@pytest.mark.parametrize("window", [3, "step"])
def test_micro_batches_of_one_step_are_one_population(window, padding_free):
    ours, theirs = copies(llama().train())
    every = [known(ours, padding_free, seed) for seed in range(3)]
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.0)
    with kondo.gated(ours, rate=0.25, window=window) as gate:
        for given in every:
            prepared(Trainer(ours, padding_free)).loss(given)[0].backward()
        optimizer.step()
    for given, factors in zip(every, gate.last.factors().split(6), strict=True):
        Trainer(theirs, padding_free, model_kwarg_keys={"use_cache"}).loss(given, factors)[0].backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-10


def test_packed_rows_whose_first_prompt_has_no_logits_are_refused():
    refused = 0
    for seed in range(12):
        model = llama().train()
        given = known(model, True, seed)
        cut = given["model_inputs"]["input_ids"].shape[1] - given["grpo_batch"].logits_to_keep - 1
        if cut:
            with pytest.raises(RuntimeError), kondo.gated(model, rate=0.34):
                Trainer(model, True).loss(given)[0].backward()
            assert all(p.grad is None for p in model.parameters())
            refused += 1
    assert refused > 4
