"""Nested containers keep their types, rows are found on the right axis, taken, packed and put back."""

import collections
import dataclasses
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BatchEncoding
from transformers.modeling_outputs import CausalLMOutput

import kondo_hooks as kondo
from kondo_hooks.rows.axes import Rows, infer_batch_size, layouts, output_rows
from kondo_hooks.rows.tree import flatten, map_tensors, unflatten


class Point(NamedTuple):
    x: torch.Tensor
    label: str


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: torch.Tensor
    extra: object = None


def tree():
    t = [torch.full((4, 2), float(i)) for i in range(8)]
    ordered = collections.OrderedDict(a=t[0], b=[t[1], "text", None])
    return (
        ordered,
        Point(t[2], "p"),
        Frozen(t[3], {"deep": (t[4], 3)}),
        CausalLMOutput(logits=t[5]),
        BatchEncoding({"input_ids": t[6]}),
        torch.max(t[7], 1),
    )


def test_every_container_keeps_its_type_and_everything_that_is_no_tensor():
    before = tree()
    after = map_tensors(lambda path, t: t + 1 if t.is_floating_point() else t, before)
    assert [type(part) for part in after] == [type(part) for part in before]
    assert after[0]["b"][1:] == ["text", None] and after[1].label == "p" and after[2].extra["deep"][1] == 3
    assert after[3].logits[0, 0] == 6 and after[3][0][0, 0] == 6 and after[4].input_ids[0, 0] == 7
    assert before[0]["a"][0, 0] == 0, "the original was changed"


def test_flatten_and_unflatten_are_inverse_and_name_paths():
    paths, leaves = flatten(tree())
    assert len(leaves) == 9 and paths[0] == "[0]['a']" and "[2].extra['deep'][0]" in paths
    again = unflatten(tree(), [leaf * 2 for leaf in leaves])
    assert all(torch.equal(a, b * 2) for a, b in zip(flatten(again)[1], leaves, strict=True))


def test_a_container_without_tensors_is_passed_on_itself():
    config = {"mode": "x", "sizes": [1, 2]}
    assert map_tensors(lambda path, t: t + 1, (torch.ones(1), config))[1] is config


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 5),
    repeat=st.integers(1, 3),
    axis=st.integers(0, 2),
    keep=st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True),
)
def test_rows_taken_weighted_and_put_back(batch, repeat, axis, keep):
    keep = sorted(k for k in keep if k < batch) or [0]
    shape = [2, 3, 4]
    shape[axis] = batch * repeat
    full = torch.arange(float(torch.Size(shape).numel())).view(shape)
    rows, index = Rows(axis, repeat), torch.tensor(keep)
    positions = [k * repeat + r for k in keep for r in range(repeat)]
    expected = full.index_select(axis, torch.tensor(positions))
    assert torch.equal(rows.take(full, index), expected)
    assert torch.equal(
        rows.put(torch.zeros_like(full), index, expected).index_select(axis, torch.tensor(positions)), expected
    )
    factors = torch.arange(1.0, len(keep) + 1)
    weighted = expected * factors.repeat_interleave(repeat).view([-1 if a == axis else 1 for a in range(3)])
    assert torch.equal(rows.weighted(expected, factors), weighted)


def test_positions_weighted_from_an_offset():
    values = torch.ones(2, 4, 3)
    out = Rows(0).weighted(values, torch.tensor([[2.0, 0.0], [0.0, 3.0]]), offset=1)
    assert out[:, :, 0].tolist() == [[0, 2, 0, 0], [0, 0, 3, 0]]
    assert Rows(0).weighted(torch.ones(2), torch.tensor([[2.0, 0.0], [0.0, 3.0]])).tolist() == [2, 3]
    flat = Rows(0, 4).weighted(torch.ones(8, 3), torch.tensor([[2.0, 0.0], [0.0, 3.0]]), offset=1)
    assert flat[:, 0].tolist() == [0, 2, 0, 0, 0, 0, 3, 0]


def test_batch_size_is_what_most_tensors_share():
    x, hidden, out = torch.zeros(6, 5, 3), torch.zeros(2, 6, 4), torch.zeros(6, 7)
    assert infer_batch_size([x, hidden], [out], 0) == 6
    assert infer_batch_size([torch.zeros(3), x], [out], 0) == 6
    assert infer_batch_size([x], [torch.zeros(30, 7)], 0) == 6
    assert infer_batch_size([torch.zeros(5, 6, 3)], [torch.zeros(5, 6, 7)], 1) == 6
    with pytest.raises(ValueError, match="batch_dim"):
        infer_batch_size([torch.zeros(())], [torch.zeros(())], 0)


def test_where_outputs_keep_their_rows():
    assert output_rows(torch.zeros(6, 7), 6, 0) == Rows(0)
    assert output_rows(torch.zeros(30, 7), 6, 0) == Rows(0, 5)
    assert output_rows(torch.zeros(2, 6, 7), 6, 0) == Rows(1)
    assert output_rows(torch.zeros(()), 6, 0) is None
    assert output_rows(torch.zeros(7, 7), 6, 0) is None


def test_every_reading_of_a_doubtful_input_is_tried_the_likeliest_first():
    readings = list(layouts([torch.zeros(4, 2), torch.zeros(4, 4), torch.zeros(3)], 4, 0))
    assert readings[0] == [Rows(0), Rows(0), None]
    assert [Rows(0), None, None] in readings and [Rows(0), Rows(1), None] in readings


@pytest.mark.parametrize("wrap", [lambda x: Point(x, "p"), lambda x: Frozen(x, [x]), lambda x: {"a": [x, 3]}])
def test_nested_inputs_are_cut_into_rows(wrap):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, *, inputs, scale):
            _, leaves = flatten(inputs)
            return wrap(self.layer(leaves[0]) * scale)

    model, x, calls = Nested(), torch.randn(8, 3), []
    model.layer.register_forward_pre_hook(lambda m, args: calls.append(len(args[0])))
    with kondo.gated(model, rate=0.25, audit=0):
        out = model(inputs=wrap(x), scale=torch.tensor(2.0))
        assert type(out) is type(wrap(x))
        flatten(out)[1][0].log_softmax(-1)[:, 0].sum().backward()
    assert [n for n in calls if n != 1] == [8, 2], "one row tells whether a named output has a graph"
