"""Every private name that the gate uses is there, does what it is used for, and is told where it is gone."""

import inspect
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from kondo_hooks import api, private
from kondo_hooks.errors import KondoWarning, WarnOnce


def test_a_backward_tells_its_number_its_end_and_where_it_goes():
    seen = {}
    x = torch.ones(2, requires_grad=True)
    y = torch.ones(2, requires_grad=True)
    both = x * y

    def look(grad):
        seen["task"], seen["keeps"] = private.graph_task(), private.keeps_graph()
        seen["x"], seen["y"] = (private.will_run(node) for node, _ in both.grad_fn.next_functions)
        private.at_the_end(lambda: seen.setdefault("grad at the end", x.grad is not None))

    both.register_hook(look)
    assert private.graph_task() == -1
    both.sum().backward(inputs=[x], retain_graph=True)
    assert seen["task"] >= 0 and seen == {**seen, "keeps": True, "x": True, "y": False, "grad at the end": True}


def test_the_shapes_of_an_operations_results():
    node = torch.ones(2, 3, requires_grad=True).unbind(1)[0].grad_fn
    assert private.result_shapes(node) == [(2,)] * 3 and private.result_shape(node, 2) == (2,)


def test_a_hook_after_accumulation():
    p = nn.Parameter(torch.ones(1))
    assert not private.has_hook_after_accumulation(p)
    p.register_post_accumulate_grad_hook(lambda _: None)
    assert private.has_hook_after_accumulation(p)


def test_modes_are_taken_off_and_put_on():
    class Counting(TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen += 1
            return func(*args, **(kwargs or {}))

    assert private.pop_mode() is None
    with Counting() as mode:
        with private.without_modes():
            torch.ones(1) + 1
        assert mode.seen == 0
        assert private.pop_mode() is mode and private.pop_mode() is None
        private.push_mode(mode)
        torch.ones(1)
    assert mode.seen == 1


def test_modes_see_a_backward_that_is_no_method():
    class Seeing(TorchFunctionMode):
        seen = ()

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen += (func,)
            return func(*args, **(kwargs or {}))

    original = torch.autograd.backward
    x = torch.ones(2, requires_grad=True)
    ends = [private.watch_backwards(), private.watch_backwards()]
    loss = x.sum()
    with Seeing() as mode:
        torch.autograd.backward(loss, retain_graph=True)
        torch.autograd.backward([loss], inputs=[x])
    assert mode.seen.count(original) == 2 and x.grad.tolist() == [2, 2]
    ends[0]()
    torch.autograd.backward(x.sum())
    ends[1]()
    assert torch.autograd.backward is original and x.grad.tolist() == [3, 3]


def test_compiled_code_meets_what_is_called_first():
    layer = nn.Linear(2, 2)
    before = dict(layer.__dict__, _forward_pre_hooks={**layer._forward_pre_hooks})
    met = []
    call = private.call_of(layer)
    setattr(layer, private.CALLED_FIRST, private.uncompiled(lambda x: met.append(x) or call(x)))
    end = private.make_dynamo_call(layer)
    torch.compile(lambda x: layer(x) + 1, backend="eager")(torch.ones(1, 2))
    assert len(met) == 1
    end()
    delattr(layer, private.CALLED_FIRST)
    assert layer.__dict__ == before


def test_a_version_that_is_not_tested_is_told_once(monkeypatch):
    assert private.untested_version() is None
    for version in ("2.7.1", "2.99.0+cpu"):
        private.untested_version.cache_clear()
        monkeypatch.setattr(torch, "__version__", version)
        assert version in private.untested_version()
    monkeypatch.setattr(api, "_warn", WarnOnce())
    with pytest.warns(KondoWarning, match=r"torch 2\.99\.0\+cpu is none of the versions"):
        api.gated(nn.Linear(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        api.gated(nn.Linear(2, 2))
    private.untested_version.cache_clear()


def test_transforms_and_cached_parametrizations():
    found = []
    torch.func.grad(lambda x: found.append(private.in_transform()) or x)(torch.ones(()))
    assert found == [True] and not private.in_transform()
    assert not private.caches_parametrizations()
    with nn.utils.parametrize.cached():
        assert private.caches_parametrizations()


def test_weights_that_were_cast_without_a_graph_are_cast_again():
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            layer(x)
        private.forget_casts()
        assert layer(x).requires_grad


def test_what_products_are_made_of():
    before = torch.get_float32_matmul_precision()
    try:
        for said, found in (("highest", {"ieee", "none"}), ("medium", {"bf16"})):
            torch.set_float32_matmul_precision(said)
            assert private.product_precision("cpu") in found
            assert private.product_precision("cuda") in ({"tf32"} if said == "medium" else found)
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_a_module_calls():
    layer = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    assert torch.equal(private.call_of(layer)(x), layer(x))
    setattr(layer, private.CALLED_FIRST, lambda x: "first")
    assert layer(x) == "first"
    layer = nn.Linear(2, 2)
    handle = layer.register_forward_hook(lambda *_: None, with_kwargs=True)
    assert private.hooks_with_kwargs(layer) == {handle.id: True}


def test_process_groups_and_sharded_modules(tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        private.default_store().set("a", "b")
        assert private.default_store().get("a") == b"b"
        assert private.collective_device(dist.group.WORLD) == "cpu"
        assert "cpu" in private.carried_devices(dist.group.WORLD)
        layer, seen = nn.Linear(2, 2), []
        replica = DistributedDataParallel(layer)
        layer.register_forward_hook(lambda *_: seen.append(private.is_in_forward(replica)))
        replica(torch.ones(1, 2)).sum().backward()
        private.rebuild_buckets(replica)
        replica(torch.ones(1, 2)).sum().backward()
        assert not replica._has_rebuilt_buckets  # there was nothing left to do
        layer(torch.ones(1, 2))
        assert seen == [True, True, False]
        module = fully_shard(nn.Linear(2, 2), mesh=dist.init_device_mesh("cpu", (1,)))
        (group,) = private.fsdp2_groups(module)
        assert group.reduce_grads
        module.set_requires_gradient_sync(False)
        assert not group.reduce_grads and group.mesh_info.mesh.ndim == 1
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        (group,) = private.fsdp2_groups(fully_shard(nn.Linear(2, 2), mesh=group.mesh_info.mesh, mp_policy=half))
        assert private.fsdp2_types(group) == {torch.bfloat16}
        wrapper = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"))
        assert private.fsdp1_syncs(wrapper)
        with wrapper.no_sync():
            assert not private.fsdp1_syncs(wrapper)
    finally:
        dist.destroy_process_group()


def test_all_of_them_were_called():
    functions = {
        name for name, f in inspect.getmembers(private, inspect.isfunction) if f.__module__ == private.__name__
    }
    source = Path(__file__).read_text()
    called = {name for name in functions if f"private.{name}(" in source}
    assert functions - called == {"_of", "_version", "_nothing"}


def test_what_is_gone_is_told_with_the_versions_that_are_known(monkeypatch):
    private._named.cache_clear()
    monkeypatch.delattr(torch._C, "_current_graph_task_id")
    with pytest.raises(
        RuntimeError, match=r"has no _current_graph_task_id in torch._C.*known to work with torch 2\.8 to 2\.15"
    ):
        private.graph_task()
    private._named.cache_clear()
