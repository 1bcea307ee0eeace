"""Pickles give plain data, and run nothing."""

import copyreg
import functools
import os
import pickle
import re
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from jax_ddpm.data.unpickling import safe_loads

PLAIN = {
    b"data": [1, 2.5, -3, 2**70, True, None],
    "text": ("é", b"\xff\x00", "", b""),
    b"nested": {"a": [[], {}, ()], 3: bytes(300)},
}


def test_plain_data_comes_back():
    for protocol in range(6):
        assert safe_loads(pickle.dumps(PLAIN, protocol)) == PLAIN


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("code", ["u1", "i1", "<i4", ">i8", "<f2", ">f4", "f8", "c16", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_back(protocol, code, order):
    array = np.arange(24).reshape(2, 3, 4).astype(code, order=order)
    data = pickle.dumps({"a": array, "b": [array[..., :1]], "same": array}, protocol)
    loaded = safe_loads(data)
    assert type(loaded["a"]) is np.ndarray
    assert loaded["a"].dtype == array.dtype
    np.testing.assert_array_equal(loaded["a"], array)
    np.testing.assert_array_equal(loaded["b"][0], array[..., :1])
    assert loaded["same"] is loaded["a"]
    loaded["a"][0] = 1  # may be written to


@pytest.mark.parametrize("protocol", [2, 5])
def test_numbers_of_numpy_and_arrays_without_any(protocol):
    value = [np.float32(1.5), np.int64(-7), np.bool_(True), np.zeros((0, 3)), np.array(5)]
    loaded = safe_loads(pickle.dumps(value, protocol))
    for got, expected in zip(loaded, value, strict=True):
        assert type(got) is type(expected)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value


def python2_array(array, module=b"numpy.core.multiarray"):
    """An array as NumPy of Python 2 wrote it: byte strings, and numbers for truths."""
    data = array.tobytes()
    code = array.dtype.str[1:].encode()
    return b"".join(
        [
            *(b"c", module, b"\n_reconstruct\ncnumpy\nndarray\n"),
            *(b"K\x00\x85U\x01b\x87R(K\x01", b"K", bytes([len(array)]), b"\x85"),
            *(b"cnumpy\ndtype\nU", bytes([len(code)]), code, b"K\x00K\x01\x87R"),
            *(b"(K\x03U\x01", array.dtype.str[:1].encode(), b"NNN"),
            *(b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb", b"\x89T"),
            *(struct.pack("<I", len(data)), data, b"tb"),
        ]
    )


@pytest.mark.parametrize("code", ["|u1", "<i4", ">f8"])
def test_what_python_2_wrote(code):
    array = np.arange(5).astype(code)
    loaded = safe_loads(b"\x80\x02}U\x04data" + python2_array(array) + b"s.")
    assert list(loaded) == [b"data"]
    assert loaded[b"data"].dtype == array.dtype
    np.testing.assert_array_equal(loaded[b"data"], array)


def test_a_list_in_itself_and_one_that_is_shared_often():
    own = []
    own.append(own)
    loaded = safe_loads(pickle.dumps(own))
    assert loaded[0] is loaded
    many = ()
    for _ in range(100):
        many = (many, [many, many])  # 3**100, if each were visited
    assert type(safe_loads(pickle.dumps(many))) is tuple


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(marker):
    """Each by what is said of it."""
    touch = f"touch {marker}"
    write = f"open({str(marker)!r}, 'w')"
    return {
        f"{os.system.__module__}.system": Call(os.system, touch),
        "builtins.eval": Call(eval, write),
        "builtins.exec": [1, {"a": (Call(exec, write),)}],
        "functools.partial": Call(functools.partial, os.system, touch),
        "builtins.getattr": Call(getattr, "", "upper"),
        f"{open.__module__}.open": Call(open, str(marker), "w"),
        "copyreg._reconstructor": Call(copyreg._reconstructor, object, object, None),
        "numpy.load": Call(np.load, "x.npy"),
        "numpy.memmap": Call(np.memmap, str(marker), "u1", "w+", 0, 4),
        "an array of dtype O8": np.array([Call(os.system, touch)]),
        "an array of dtype V9": np.zeros(3, [("a", "u1"), ("b", "O")]),
        "an array of dtype M8": np.zeros(3, "M8[s]"),
        "an array of dtype S3": np.array([b"abc"]),
        "builtins.set": {1},
        f"{__name__}.Call": Call,
    }


@pytest.mark.parametrize("expected", attacks(""))
@pytest.mark.parametrize("protocol", [2, 3])
def test_nothing_runs(tmp_path, monkeypatch, expected, protocol):
    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(Call=Call))  # pickle looks it up
    marker = tmp_path / "ran"
    # Python's modules by their names of today.
    data = pickle.dumps(attacks(marker)[expected], protocol, fix_imports=False)
    with pytest.raises(ValueError) as caught:
        safe_loads(data)
    line = f"cannot read the pickle: it (asks for|has) {re.escape(expected)}, which is refused"
    assert re.fullmatch(line, str(caught.value))
    assert not marker.exists()


DTYPE = b"cnumpy\ndtype\n"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n"
EMPTY = ARRAY + b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R"
U1 = DTYPE + b"U\x02u1K\x00K\x01\x87R"


def state(shape=b"K\x03\x85", dtype=U1, data=b"U\x03abc"):
    return b"(K\x01" + shape + dtype + b"\x89" + data + b"tb"


CRAFTED = {
    "os.system by its old name": b"cos\nsystem\n(U\x06touch tR.",
    "INST": b"(U\x01xios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nU\x01xo.",
    "STACK_GLOBAL": b"\x80\x04" + text(b"os") + text(b"system") + b"\x93.",
    "a dotted name": b"\x80\x04" + text(b"numpy") + text(b"dtype.type.mro") + b"\x93.",
    "a dotted module": b"\x80\x04" + text(b"numpy.core") + text(b"multiarray.scalar.x") + b"\x93.",
    "a persistent id": b"Pname\n.",
    "a persistent id, binary": b"K\x01Q.",
    "a buffer from elsewhere": b"\x80\x05\x97.",
    "an extension": b"\x82\x01.",
    "an array of another class": ARRAY + DTYPE + b"K\x00\x85U\x01b\x87R.",
    "ndarray called": b"cnumpy\nndarray\nK\x03\x85\x85R.",
    "ndarray made": b"cnumpy\nndarray\nK\x03\x85\x85\x81.",
    "ndarray given out": b"cnumpy\nndarray\n.",
    "an array without a state": EMPTY + b".",
    "a dtype given out": U1 + b".",
    "a dtype of objects": DTYPE + b"U\x01OK\x00K\x01\x87R.",
    "a dtype of fields": DTYPE + b"U\x05u1,u1K\x00K\x01\x87R.",
    "a dtype of a list": DTYPE + b"]K\x00K\x01\x87R.",
    "a dtype that gets fields": U1 + b"(K\x03U\x01|NU\x01a}J\xff\xff\xff\xffK\x01K\x01tb.",
    "a dtype that becomes a subarray": U1 + b"(K\x03U\x01|)NNK\x01K\x01K\x01tb.",
    "a dtype of a wrong order": U1 + b"(K\x03U\x01xNNNK\x01K\x01K\x01tb.",
    "a dtype with a short state": U1 + b"K\x03\x85b.",
    "an array of no dtype": EMPTY + state(dtype=b"N") + b".",
    "an array too large": EMPTY + state(shape=b"K\x04\x85") + b".",
    "a huge array": EMPTY + state(shape=b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86") + b".",
    "a negative shape": EMPTY + state(shape=b"J\xff\xff\xff\xffJ\xfd\xff\xff\xff\x86") + b".",
    "an array of a list": EMPTY + state(data=b"]") + b".",
    "a function that gets attributes": ARRAY + b"}U\x09_functioncos\nsystem\nsb.",
    "a function that gets a state": ARRAY + b"}U\x09_functionU\x01xsb.",
    "a function that gets slots": ARRAY + b"N}U\x0c__defaults__)s\x86b.",
    "an array as a key": b"}" + U1 + b"K\x01s.",
    "a deep list": b"]" * 100_000 + b"a" * 99_999 + b".",
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_pickles_are_refused(name):
    with pytest.raises(ValueError, match=r"^cannot read the pickle: [^\n]+$"):
        safe_loads(CRAFTED[name])
    # None of them leaves anything behind.
    array = np.arange(3, dtype="u1")
    np.testing.assert_array_equal(safe_loads(pickle.dumps(array, 2)), array)


def test_the_crafted_parts_are_right_where_nothing_is_wrong():
    np.testing.assert_array_equal(safe_loads(EMPTY + state() + b"."), list(b"abc"))


def test_damaged_pickles_are_said_in_one_line():
    whole = pickle.dumps({"a": np.arange(300), "b": list(range(50))}, 2)
    for end in range(len(whole)):
        with pytest.raises(ValueError, match=r"^cannot read the pickle: [^\n]+$"):
            safe_loads(whole[:end])


def test_random_bytes_raise_nothing_else():
    random = np.random.default_rng(0)
    whole = np.frombuffer(pickle.dumps({"a": np.arange(30), "b": ["x", (1.5, b"y")]}, 2), np.uint8)
    for _ in range(2000):
        damaged = whole.copy()
        places = random.integers(0, len(whole), 3)
        damaged[places] = random.integers(0, 256, 3)
        # These read a size or a place in memory, which alone may be of gigabytes.
        if np.any(np.isin(damaged, list(b"rj\x8b\x8d\x8e\x96"))):
            continue
        try:
            safe_loads(damaged.tobytes())
        except ValueError as error:
            assert re.fullmatch("cannot read the pickle: .+", str(error))
