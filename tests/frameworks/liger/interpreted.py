"""Triton's kernels on a CPU, by its interpreter. Import this before liger.

The interpreter gives kernels their integers as Triton scalars but leaves floats as Python's, on which liger calls
``.to``; a compiled kernel gets both as scalars.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy
from triton import language
from triton.runtime import interpreter

_convert = interpreter._implicit_cvt


def _converted(value):
    if type(value) is float:
        handle = interpreter.TensorHandle(numpy.array([value], dtype=numpy.float32), language.float32)
        return language.tensor(handle, language.float32)
    return _convert(value)


interpreter._implicit_cvt = _converted
