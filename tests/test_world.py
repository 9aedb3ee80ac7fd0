"""Plans that all ranks make alike: who replays how many rows, and which move."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from kondo_hooks.ranks import together as world
from kondo_hooks.ranks.agreement import Ranks, _unwrap, _wrap


@st.composite
def kept_counts(draw):
    ranks, slots = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    rows = st.lists(st.integers(0, 20), min_size=slots, max_size=slots)
    counts = torch.tensor(draw(st.lists(rows, min_size=ranks, max_size=ranks)))
    return counts, draw(st.lists(st.booleans(), min_size=slots, max_size=slots))


@given(kept_counts())
def test_rows_are_spread_within_one_and_none_is_lost(case):
    counts, movable = case
    target = world.even_counts(counts, movable)
    assert target.sum(0).tolist() == counts.sum(0).tolist()
    for slot, can in enumerate(movable):
        if can:
            assert target[:, slot].max() - target[:, slot].min() <= 1
        else:
            assert torch.equal(target[:, slot], counts[:, slot])
    if all(movable):
        total = target.sum(1)
        assert total.max() - total.min() <= 1


@given(kept_counts())
def test_transfers_bring_every_rank_to_its_target(case):
    counts, movable = case
    surplus = (counts - world.even_counts(counts, movable))[:, 0].tolist()
    left = list(surplus)
    for giver, taker, n in world._transfers(surplus):
        assert n > 0 and surplus[giver] > 0 > surplus[taker]
        left[giver] -= n
        left[taker] += n
    assert not any(left)


def test_ranks_that_are_even_already_move_nothing():
    for counts in ([[0], [1]], [[1], [0]], [[2, 1], [1, 2]], [[3], [3], [4]]):
        kept = torch.tensor(counts)
        assert torch.equal(world.even_counts(kept, [True] * kept.shape[1]), kept)


def test_imbalance_is_the_busiest_ranks_share_of_the_mean():
    assert world.imbalance(torch.tensor([[4], [0]])) == 2
    assert world.imbalance(torch.tensor([[1, 1], [2, 0]])) == 1
    assert world.imbalance(torch.tensor([[0], [0]])) == 1


def test_tensors_of_any_shape_and_type_travel_as_bytes():
    parcel = [
        [torch.randn(3, 5), torch.arange(7), torch.tensor(True), torch.empty(0, 4)],
        [torch.randn(2).to(torch.bfloat16), torch.randn(1, 1, dtype=torch.float64), torch.tensor([1 + 2j])],
        [],
    ]
    received = _unwrap(_wrap(parcel, torch.device("cpu")))
    assert len(received) == len(parcel)
    for sent, got in zip(parcel, received, strict=True):
        for a, b in zip(sent, got, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    assert _unwrap(_wrap([], torch.device("cpu"))) == []


class _Store:
    """Of a process that has ended, or of one that goes on."""

    def __init__(self, ended=False):
        self.ended, self.values = ended, {}

    def check(self, keys):
        if self.ended:
            raise dist.DistNetworkError("Connection reset by peer")
        return all(key in self.values for key in keys)

    def add(self, key, n):
        return n

    def set(self, key, value):
        self.values[key] = value.encode()

    def get(self, key):
        return self.values[key]


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("failed", [False, True])
def test_a_rank_that_looks_last_does_not_need_the_one_that_keeps_the_store(ended, failed):
    """The other has finished its last step and its program; what this rank has to say is still said."""
    ranks = Ranks()
    ranks.size, ranks._store, ranks._prefix = 2, _Store(), f"test/{ended}/{failed}"
    if failed:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "get_rank", lambda: 1)
            ranks.announce(ValueError("mine"))
    ranks._store.ended = ended
    with pytest.raises(ValueError, match="mine") if failed else contextlib.nullcontext():
        ranks.raise_failures()
    assert not ranks.failed
