"""Pickles of plain data and NumPy arrays, read without running anything that they name."""

import io
import math
import pickle
import re
from typing import Any

import numpy as np


def safe_loads(data: bytes) -> Any:
    """What a pickle holds: arrays of numbers, text, bytes, numbers, tuples, lists and dicts.

    Text of Python 2 comes as bytes. Raises `ValueError` naming anything else that it asks for, and
    for damage. One that was made to harm can still ask for much memory.
    """
    try:
        return _plain(_Unpickler(io.BytesIO(data), encoding="bytes").load(), {})
    except Exception as error:  # damage raises nearly anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"cannot read the pickle: {reason}") from None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        name = f"{module_name}.{global_name}".replace("numpy._core.", "numpy.core.")
        if name not in _STAND_INS:
            raise ValueError(f"it asks for {name}, which is refused")
        return _STAND_INS[name]


class _StandIn:
    """What a pickle gets in the place of a function: it may call it, and do nothing else."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it changes a function, which is refused")


class _DType:
    """A dtype of numbers, or none."""

    def __init__(self, code: str | bytes, align: Any = False, copy: Any = False) -> None:
        text = _to_text(code)
        if not re.fullmatch(r"[<>=|]?[biufc][0-9]{1,2}", text):
            raise ValueError(f"it has an array of dtype {text}, which is refused")
        self.numpy = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        _, order, subarray, names, fields, *_ = state
        if not subarray is names is fields is None:
            raise ValueError("it has an array of a structured dtype, which is refused")
        self.numpy = self.numpy.newbyteorder(_to_text(order))


class _Array:
    """An array that is there once its state is: NumPy makes an empty one first."""

    numpy: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        self.numpy = _to_array(data, dtype, shape, "F" if is_fortran else "C")


def _to_array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(dtype, _DType) or not isinstance(data, bytes | bytearray):
        raise ValueError("it has an array without a dtype or without bytes")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"it has an array of shape {shape}")
    size = math.prod(shape) * dtype.numpy.itemsize
    if size != len(data):
        raise ValueError(f"it has an array of {len(data)} bytes, expected {size}")
    # A copy, so that later writes do not touch the pickle's bytes.
    return np.frombuffer(bytearray(data), dtype.numpy).reshape(shape, order=order)


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _STAND_INS["numpy.ndarray"]:
        raise ValueError("it has an array of another class")
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.numpy = _to_array(data, dtype, shape, order)
    return array


def _scalar(dtype: Any, data: Any) -> Any:
    return _to_array(data, dtype, (), "C")[()]


def _to_text(text: Any) -> Any:
    return text.decode("latin1") if isinstance(text, bytes) else text


def _encode(text: str, encoding: Any) -> bytes:
    """How bytes are written for Python 2."""
    return text.encode("latin1")


def _refuse(*arguments: Any) -> None:
    raise ValueError("it makes an array by itself, which is refused")


_STAND_INS = {
    "__builtin__.bytes": _StandIn(lambda: b""),
    "_codecs.encode": _StandIn(_encode),
    "numpy.core.multiarray._reconstruct": _StandIn(_reconstruct),
    "numpy.core.multiarray.scalar": _StandIn(_scalar),
    "numpy.core.numeric._frombuffer": _StandIn(_from_buffer),
    "numpy.dtype": _StandIn(_DType),
    "numpy.ndarray": _StandIn(_refuse),
}


def _plain(value: Any, seen: dict[int, Any]) -> Any:
    """The value with its arrays in place. What was seen comes back: lists may hold themselves."""
    kind = type(value)
    if kind in _ATOMS or isinstance(value, np.generic):
        return value
    if id(value) in seen:
        return seen[id(value)]
    if kind is _Array and value.numpy is not None:
        return value.numpy
    if kind is list:
        seen[id(value)] = value
        value[:] = [_plain(each, seen) for each in value]
    elif kind is dict:
        seen[id(value)] = value
        if wrong := [key for key in value if type(key) not in _ATOMS]:
            raise ValueError(f"it has a key that is a {type(wrong[0]).__name__}")
        value.update({key: _plain(each, seen) for key, each in value.items()})
    elif kind is tuple:
        seen[id(value)] = tuple(_plain(each, seen) for each in value)
    else:
        raise ValueError(f"it holds a {kind.__name__.strip('_')}, which is refused")
    return seen[id(value)]


_ATOMS = {bool, bytearray, bytes, float, int, str, type(None)}
