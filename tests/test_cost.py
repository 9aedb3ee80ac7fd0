"""What the gate is for: dropped rows cost no graph. Counted, not timed."""

import pytest
import torch

import kondo_hooks as kondo
from benchmarks import heads
from benchmarks.step import saved_bytes
from tests.cases import MODELS, make_batch


@pytest.mark.parametrize("name", ["mlp", "gpt2", "llama", "lstm"])
def test_saved_bytes_are_those_of_the_loss_on_the_outputs_and_of_the_kept_rows_alone(name):
    case = next(c for c in MODELS if c.name == name)
    model = case.build().eval()
    batch = make_batch(64, case.sequence, torch.float32)

    def loss(logits, part):
        logp = logits.log_softmax(-1).gather(-1, part.actions.unsqueeze(-1)).squeeze(-1)
        (-logp * part.advantages).mean().backward()

    def step(rows=slice(None)):
        part = batch.rows(rows)
        loss(case.logits(case.call(model, part), part), part)

    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    full = saved_bytes(step, parameters)
    with kondo.gated(model, rate=2 / 64) as gate:
        step()
        gated = saved_bytes(step, parameters)
    kept = saved_bytes(lambda: step(gate.last.kept), parameters)
    with torch.no_grad():
        outputs = case.logits(case.call(model, batch), batch)
    of_loss = saved_bytes(lambda: loss(outputs.requires_grad_(), batch), parameters)
    assert gated <= 1.05 * (of_loss + kept)
    assert gated < full / 2


def test_screen_first_never_runs_a_dropped_row():
    case = next(c for c in MODELS if c.name == "llama")
    model, batch, rows = case.build(), make_batch(64, True, torch.float32), []
    model.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    with kondo.gated(model, rate=2 / 64) as gate:
        gate.preselect(logp=batch.old_logp, advantages=batch.advantages, mask=batch.mask)
        case.call(model, batch).logits.log_softmax(-1)[..., 0].sum().backward()
    assert rows == [2]


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"noise": 0.7}, {"unit": "token", "rate": 0.1}], ids=str)
@pytest.mark.parametrize("kind", heads.HEADS)
def test_no_step_holds_logits_of_all_rows_where_the_model_makes_none(kind, options):
    if kind == "TRL's fused head":
        pytest.importorskip("trl", minversion="1.15")
    ids, u = torch.randint(heads.WORDS, (heads.ROWS, heads.TOKENS)), torch.randn(heads.ROWS, 1)
    model = heads.HEADS[kind]()
    with kondo.gated(model, **{"rate": None if "noise" in options else 1 / 8, **options}) as gate, heads.Held() as held:
        for _ in range(2):  # in the first it finds out what it must know of the model
            heads.step(model, ids, u)
    assert 0 < gate.stats.kept < gate.stats.rows
    assert held.largest == heads.LOGITS if kind == "logits outside" else held.largest < heads.LOGITS / 4


@pytest.mark.parametrize("kind", heads.HEADS)
def test_a_gated_step_holds_no_more_than_the_plain_one(kind):
    if kind == "TRL's fused head":
        pytest.importorskip("trl", minversion="1.15")
    found = heads.measure(kind)
    for loop in ("gated", "screen-first"):
        assert found[loop].peak <= found["plain"].peak and found[loop].largest <= found["plain"].largest
