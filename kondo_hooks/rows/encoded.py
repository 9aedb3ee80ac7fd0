"""What holds rows and is no plain tensor, as a tensor that has them on an axis, and back.

Arrays, packed sequences, jagged tensors, and lists with an entry a row. Each row of an input becomes bytes, so that it
can be taken, held, padded and moved as rows are; an output becomes a padded tensor, to which the loss's gradient comes.
"""

import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from kondo_hooks.rows.axes import pad_to

_HUGE = 2**28
_NOT_TAKEN = (torch.uint16, torch.uint32, torch.uint64)
"""Types that torch has no index_select for."""


@dataclass
class Encoded:
    """A stand-in for a value.

    Attributes:
        part: the tensor that has its rows.
        decode: makes such a value of other rows; the second argument is shared by what is decoded together.
        constant: what it is made of beside the tensor.
    """

    part: Tensor
    decode: Callable[[Tensor, dict[Any, Any]], Any]
    constant: Any = None


class _Untouchable:
    """An entry that raises whatever is asked of it."""

    def _refuse(self, *_: Any) -> Any:
        raise TypeError("an array that is not to be read was read")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __hash__ = _refuse


class Unread:
    """Stands for the tensor of an input: a model that reads it fails. An array decodes to one of entries that raise."""

    def __init__(self, shape: torch.Size):
        self._shape = tuple(shape)

    def numpy(self) -> Any:
        """What the array is decoded to."""
        import numpy as np

        return np.full(self._shape, _Untouchable(), dtype=object)


def encode_input(value: Any) -> Encoded | None:
    """An array, sequence or tensor of another layout; None if there is nothing to do.

    Raises:
        RuntimeError: if it wants a gradient, or is of a kind that cannot be cut.
    """
    if isinstance(value, Tensor):
        if value.layout is torch.strided and not value.is_nested:
            return None
        if value.layout is torch.sparse_coo:
            _refuse_gradient("sparse tensor", [value])
            return None
        if value.layout is torch.jagged or value.is_nested:
            rows = list(value.unbind())
            _refuse_gradient("nested tensor", [value])
            if value.layout is torch.jagged:
                shared = id(value.offsets())  # type: ignore[attr-defined]
                return _row_bytes(rows, lambda rows, memo: _jagged(rows, memo, shared), "jagged")
            return _row_bytes(rows, lambda rows, memo: torch.nested.as_nested_tensor(rows), "nested")
        _refuse_gradient("sparse tensor", [value])
        back = {torch.sparse_csr: Tensor.to_sparse_csr, torch.sparse_csc: Tensor.to_sparse_csc}.get(value.layout)
        return None if back is None else Encoded(value.to_sparse_coo(), lambda part, memo: back(part))
    if isinstance(value, PackedSequence):
        _refuse_gradient("PackedSequence", [value.data])
        rows = _unpack(value)
        is_sorted = value.sorted_indices is None
        return _row_bytes(rows, lambda rows, memo: _packed(rows, is_sorted), ("packed", is_sorted))
    return _array(value) if is_array(value) else None


def encode_rows(rows: Sequence[Any]) -> Encoded:
    """A list or tuple with an entry a row: tensors of one type, plain values, or anything else."""
    kind: Any = _array_of if is_array(rows) else type(rows)
    rows = list(rows)
    if are_alike(rows):
        return _row_bytes(rows, lambda rows, memo: kind(rows), ("list", kind))
    if all(map(_is_plain, rows)):
        dumped = [torch.frombuffer(bytearray(pickle.dumps(row)), dtype=torch.uint8) for row in rows]
        return _row_bytes(
            dumped,
            lambda rows, memo: kind(pickle.loads(bytes(row.tolist())) for row in rows),
            ("plain", kind),
        )
    width = 2 if len(rows) != 2 else 3  # an axis that is never taken for the rows'
    index = torch.arange(len(rows), device="cpu").view(-1, 1).expand(-1, width).clone()
    return Encoded(index, lambda part, memo: kind(rows[i] for i in part[:, 0].tolist()), rows)


def encode_numbers(numbers: Sequence[int]) -> Encoded:
    """A list or tuple of whole numbers as a tensor of them."""
    kind: Any = type(numbers)
    return Encoded(torch.tensor(numbers, device="cpu"), lambda part, memo: kind(part.tolist()), ("numbers", kind))


def is_array(value: Any) -> bool:
    """Whether it is a numpy array, of numpy's own class."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is numpy.ndarray


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return value is None or type(value) in (str, bytes, bool, int, float)


def _refuse_gradient(kind: str, tensors: Sequence[Tensor]) -> None:
    if any(t.requires_grad for t in tensors):
        raise RuntimeError(
            f"gated: an input is a {kind} that requires grad, whose gradient the gate cannot cut into rows; detach it, "
            "or pass it as a padded, dense tensor"
        )


def _array_of(rows: Any) -> Any:
    import numpy as np

    rows = list(rows)
    array = np.empty(len(rows), dtype=object)
    for i, row in enumerate(rows):  # in one assignment, rows that are lists would become axes
        array[i] = row
    return array


def _array(value: Any) -> Encoded | None:
    import numpy as np

    dtype = value.dtype
    if dtype.hasobject or not dtype.itemsize:
        return None
    # The array's owner may write into it, unseen; a huge one is a table, and no batch.
    given = np.ascontiguousarray(value if value.nbytes > _HUGE else value.copy()).reshape(value.shape)
    if dtype.isnative and dtype.kind in "biufc" and dtype.char not in "gG" and given.flags.writeable:
        tensor = torch.from_numpy(given)
        if tensor.dtype not in _NOT_TAKEN:
            return Encoded(tensor, lambda part, memo: part.numpy(), "array")
    raw = torch.from_numpy(given.reshape(-1).view(np.uint8).reshape(*value.shape, dtype.itemsize))
    return Encoded(
        raw, lambda part, memo: np.ascontiguousarray(part.numpy()).view(dtype).reshape(part.shape[:-1]), dtype
    )


def _row_bytes(
    rows: Sequence[Tensor], rebuild: Callable[[list[Tensor], dict[Any, Any]], Any], constant: Any
) -> Encoded:
    """Each row as its shape and its values, in bytes, with zeros behind them: so rows of other calls can be joined."""
    dtype, dims = rows[0].dtype, rows[0].dim()
    values = [row.detach().contiguous().reshape(-1).view(torch.uint8) for row in rows]
    shapes = torch.tensor([[*row.shape] for row in rows], dtype=torch.long, device=rows[0].device).view(len(rows), dims)
    width = max(len(v) for v in values)
    width += 1 if dims * 8 + width == len(rows) else 0
    part = torch.cat([shapes.view(torch.uint8), torch.stack([pad_to(v, [width]) for v in values])], 1)

    def decode(part: Tensor, memo: dict[Any, Any]) -> Any:
        found = (
            part[:, : dims * 8].flatten().clone().view(torch.long).view(-1, dims).tolist() if dims else [[]] * len(part)
        )
        taken = []
        for row, shape in zip(part[:, dims * 8 :], found, strict=True):
            size = torch.Size(shape).numel() * dtype.itemsize
            taken.append(row[:size].clone().view(dtype).view(shape))
        return rebuild(taken, memo)

    return Encoded(part, decode, (constant, dtype, dims))


def _jagged(rows: list[Tensor], memo: dict[Any, Any], shared: int) -> Tensor:
    """Tensors whose offsets were one tensor can be added: so theirs are again."""
    offsets = memo.get(("offsets", shared))
    if offsets is None:
        lengths = torch.tensor([0, *map(len, rows)], device=rows[0].device)
        offsets = memo["offsets", shared] = lengths.cumsum(0)
    return torch.nested.nested_tensor_from_jagged(torch.cat(rows), offsets)


def _places(packed: PackedSequence) -> tuple[Tensor, Tensor]:
    """Of each entry of ``packed.data``, its sequence and its step."""
    sizes = packed.batch_sizes.to(packed.data.device)
    steps = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    sequences = torch.arange(len(steps), device=sizes.device) - starts
    return sequences if packed.sorted_indices is None else packed.sorted_indices[sequences], steps


def _unpack(packed: PackedSequence) -> list[Tensor]:
    sequences, _ = _places(packed)
    order = sequences.argsort(stable=True)
    return list(packed.data[order].split(sequences.bincount().tolist()))


def _packed(rows: list[Tensor], is_sorted: bool) -> PackedSequence:
    lengths = [len(row) for row in rows]
    return pack_sequence(rows, enforce_sorted=is_sorted and lengths == sorted(lengths, reverse=True))


# Outputs: their rows are padded, and have a gradient.


def encode_output(value: Any) -> Encoded | None:
    """A packed sequence or jagged tensor as (B, T, ...) with zeros behind each row; None if there is nothing to do.

    Raises:
        RuntimeError: if it is of a layout that has no rows to be told apart.
    """
    if isinstance(value, PackedSequence):
        places = _places(value)
        return Encoded(_padded(value.data, *places), lambda part, memo: value._replace(data=part[places]), "packed")
    if not isinstance(value, Tensor) or (value.layout is torch.strided and not value.is_nested):
        return None
    if not value.is_floating_point():
        return None
    if value.layout is torch.jagged and value._lengths is None and value._ragged_idx == 1:  # type: ignore[attr-defined]
        offsets, values = value.offsets(), value.values()  # type: ignore[attr-defined]
        lengths = offsets.diff()
        sequences = torch.arange(len(lengths), device=offsets.device).repeat_interleave(lengths)
        steps = torch.arange(len(values), device=offsets.device) - offsets[:-1].repeat_interleave(lengths)
        return Encoded(
            _padded(values, sequences, steps),
            lambda part, memo: torch.nested.nested_tensor_from_jagged(part[sequences, steps], offsets),
            "jagged",
        )
    raise RuntimeError(
        f"gated: the model returned a tensor of layout {value.layout}, whose rows the gate cannot tell apart; return "
        "it dense (to_dense()), or jagged along its second axis"
    )


def _padded(values: Tensor, rows: Tensor, steps: Tensor) -> Tensor:
    size = torch.stack([rows.max(), steps.max()]).tolist() if len(rows) else [-1, -1]
    padded = values.new_zeros(size[0] + 1, size[1] + 1, *values.shape[1:])
    return padded.index_put((rows, steps), values)


def encode_row_list(rows: Sequence[Tensor]) -> Encoded:
    """Tensors, one a row, as one tensor with zeros behind each."""
    kind: Any = type(rows)
    shapes = [row.shape for row in rows]
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    return Encoded(
        torch.stack([pad_to(row, largest) for row in rows]),
        lambda part, memo: kind(part[i][tuple(map(slice, shape))] for i, shape in enumerate(shapes)),
        "list",
    )


def are_alike(rows: Sequence[Any]) -> bool:
    """Whether they are dense tensors of one type, device and number of axes."""
    if not rows or not all(isinstance(row, Tensor) and row.layout is torch.strided for row in rows):
        return False
    return len({(row.dtype, row.dim(), row.device) for row in rows}) == 1
