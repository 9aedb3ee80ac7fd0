"""liger's own losses and kernels: what is chosen before the forward is exact, and what hides its rows is an error."""

import re
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("tests.frameworks.liger.interpreted", reason="make frameworks ONLY=liger")  # before liger
pytest.importorskip("liger_kernel", reason="make frameworks ONLY=liger")
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # isort: skip
from liger_kernel.transformers import apply_liger_kernel_to_llama  # isort: skip
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import kondo_hooks as kondo
from tests.reference import Runs, copies, grads, largest_relative_difference

pytestmark = pytest.mark.filterwarnings("ignore")
V, B, PROMPT, T = 29, 8, 2, 5
CODE = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[3] / "docs/frameworks/liger.md").read_text(), re.DOTALL
)
LOSSES = ["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo"]


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes, num_key_value_heads=1, initializer_range=0.2))


def batch():
    g = torch.Generator().manual_seed(1)
    mask = (torch.arange(T) < torch.randint(2, T + 1, (B, 1), generator=g)).float()
    ids, advantages = torch.randint(V, (B, PROMPT + T), generator=g), torch.randn(B, generator=g)
    old = torch.randn(B, T, generator=g) * 0.3 - 3.3
    return {"ids": ids, "mask": mask, "advantages": advantages, "old_log_probs": old, "ref": old - 0.1}


def fused(**options):
    return LigerFusedLinearGRPOLoss(**{"beta": 0.0, "compiled": False, "use_ref_model": False, **options})


def loss_of(model, loss, given, mask=None):
    """The learner's step: the loss of all rows, or with the tokens of some masked."""
    hidden = model.model(given["ids"]).last_hidden_state[:, PROMPT - 1 : -1]
    mine = given["mask"] if mask is None else given["mask"] * mask[:, None]
    extra = {"old_per_token_logps": given["old_log_probs"], "num_items_in_batch": given["mask"].sum()}
    return loss(hidden, model.lm_head.weight, given["ids"][:, PROMPT:], mine, given["advantages"], **extra)[0]


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_kept_rows_alone_have_the_gradient_of_the_masked_loss(loss_type, chunk_size):
    page = {}
    exec(CODE[0], page)
    loss, given = fused(loss_type=loss_type, max_completion_length=T, chunk_size=chunk_size), batch()
    ours, theirs = copies(llama())
    runs = Runs(ours, V)
    value, _ = page["kept_loss"](ours, loss, given)
    value.backward()
    delight = -(given["old_log_probs"] * given["mask"]).sum(1) * given["advantages"]
    keep = torch.zeros(B).index_fill(0, delight.topk(B // 4).indices, 1)
    masked = loss_of(theirs, loss, given, keep)
    if loss_type == "bnpo":  # divides by the tokens that are not masked
        masked = masked * (given["mask"] * keep[:, None]).sum() / given["mask"].sum()
    masked.backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 2e-6
    assert runs.tokens == [B // 4 * (PROMPT + T)]
    assert value.item() == pytest.approx(masked.item(), rel=1e-5)
    full = llama()
    loss_of(full, loss, given).backward()
    assert largest_relative_difference(grads(ours), grads(full)) > 1e-2


def test_a_draw_puts_its_factors_on_the_advantages():
    page = {}
    exec(CODE[0], page)
    page["selector"].__init__(kondo.SelectionConfig(price=0.5, hard=False, temperature=2.0))
    loss, given = fused(), batch()
    ours, theirs = copies(llama())
    page["kept_loss"](ours, loss, given)[0].backward()
    delight = -(given["old_log_probs"] * given["mask"]).sum(1) * given["advantages"]
    given["advantages"] = given["advantages"] * torch.sigmoid((delight - 0.5) / 2)
    loss_of(theirs, loss, given).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 2e-6


class Learner:
    def __init__(self, model):
        self.model = model

    def loss(self, given):
        return loss_of(self.model, fused(), given)


def test_the_model_that_the_loop_goes_past_is_told():
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(kondo.KondoWarning, match="never called"), kondo.gated(model, rate=0.25):
        loss_of(model, fused(), batch()).backward()
        optimizer.step()


def test_a_body_whose_loss_hides_the_policy_is_an_error():
    model = llama()
    with pytest.raises(kondo.DelightError, match="no policy was found"), kondo.gated(model.model, rate=0.25):
        loss_of(model, fused(), batch()).backward()


@pytest.mark.parametrize("options", [{}, {"rate": "lossless"}, {"priority": "uniform", "shared_loss": "kept"}], ids=str)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_function_with_the_loss_inside_is_an_error(loss_type, options):
    model = llama()
    learner = Learner(model)
    learner.loss = lambda given: loss_of(model, fused(loss_type=loss_type, max_completion_length=T), given)
    with (
        pytest.raises(RuntimeError, match=r"has no row for each sample|must not depend on how many rows"),
        kondo.gated(model, method=(learner, "loss"), **{"rate": 0.25, **options}),
    ):
        learner.loss(batch()).backward()
    assert all(p.grad is None for p in model.parameters())


def test_dropped_rows_that_reach_the_head_are_an_error():
    model, given = llama(), batch()
    with kondo.gated(model.model, rate=0.25) as gate:
        gate.preselect(given["old_log_probs"], given["advantages"], given["mask"])
        with pytest.raises(RuntimeError, match=r"preselect.* the loss code applies"):
            loss_of(model, fused(), given).backward()


def test_a_draw_at_the_body_leaves_the_head_all_rows():
    ours, theirs = copies(llama())
    given, loss = batch(), fused()
    with kondo.gated(ours.model, noise=0.7) as gate:
        loss_of(ours, loss, given).backward()
    factors = gate.last.factors().float()
    assert (factors == 0).sum() > 0
    hidden = theirs.model(given["ids"]).last_hidden_state
    hidden.register_hook(lambda grad: grad * factors[:, None, None])
    theirs.model.forward = lambda _: type("Out", (), {"last_hidden_state": hidden})
    loss_of(theirs, loss, given).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 2e-6


@pytest.fixture
def patched():
    """A llama whose kernels are liger's, and afterwards transformers' own again."""
    before = dict(vars(modeling_llama))
    classes = {kind: dict(vars(kind)) for kind in (modeling_llama.LlamaForCausalLM, modeling_llama.LlamaMLP)}

    def patch(**options):
        apply_liger_kernel_to_llama(rms_norm=False, **options)
        return llama().train()

    yield patch
    vars(modeling_llama).update(before)
    for kind, names in classes.items():
        kind.forward = names["forward"]


def labelled(model, ids, factors=None):
    out = model(input_ids=ids, labels=None if factors is not None else ids, use_cache=False)
    if factors is None:
        return out.loss
    logp = out.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return -(logp * factors[:, None]).mean()


def test_the_kernels_of_layers_are_exact(patched):
    model = patched(fused_linear_cross_entropy=False, cross_entropy=False)
    assert "liger" in type(model.model.layers[0].mlp).__module__ or "Liger" in str(modeling_llama.LlamaMLP)
    ours, theirs = copies(model)
    ids = batch()["ids"]
    with kondo.gated(ours, rate=0.25) as gate:
        labelled(ours, ids).backward()
    labelled(theirs, ids, gate.last.factors().float()).backward()
    assert largest_relative_difference(grads(ours), grads(theirs)) < 1e-4
    assert gate.stats.kept == 2


@pytest.mark.parametrize("options", [{}, {"shared_loss": "kept"}, {"priority": "uniform"}], ids=str)
@pytest.mark.parametrize(
    "kernel", [{"fused_linear_cross_entropy": True}, {"fused_linear_cross_entropy": False, "cross_entropy": True}]
)
def test_a_fused_loss_inside_the_model_is_named(kernel, options, patched):
    model = patched(**kernel)
    with pytest.raises(RuntimeError, match="a fused loss"), kondo.gated(model, rate=0.25, **options):
        labelled(model, batch()["ids"]).backward()
    assert all(p.grad is None for p in model.parameters())


def test_what_the_page_says_of_patches_is_liger_s_name():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CODE[1].strip() == "apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, cross_entropy=False)"
