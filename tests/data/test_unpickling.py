"""Pickles give plain data, and run nothing."""

import contextlib
import pickle
import struct

import numpy as np
import pytest

from jax_ddpm.data.unpickling import safe_loads

PLAIN = {
    b"data": [1, 2.5, -3, 2**70, True, None],
    "text": ("é", b"\xff\x00", "", b""),
    b"nested": {"a": [[], {}, ()], 3: bytes(300)},
}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_arrays_and_numbers_come_back(protocol):
    assert safe_loads(pickle.dumps(PLAIN, protocol)) == PLAIN
    array = np.arange(24).reshape(2, 3, 4)
    values = [array.astype(code) for code in ("u1", ">i8", "<f2", "f8", "c16", "?")]
    values += [np.asfortranarray(array), array[..., :1], np.zeros((0, 3)), np.array(5)]
    values += [np.float32(1.5), np.int64(-7), np.bool_(True)]
    loaded = safe_loads(pickle.dumps([*values, values[0]], protocol))
    for got, expected in zip(loaded[:-1], values, strict=True):
        assert type(got) is type(expected) and got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    assert loaded[-1] is loaded[0]
    loaded[0][0] = 1  # may be written to


@pytest.mark.parametrize("code", ["|u1", "<i4", ">f8"])
def test_arrays_of_python_2(code):
    """As its NumPy wrote them: byte strings, and numbers for truths."""
    array = np.arange(5).astype(code)
    data, order, kind = array.tobytes(), code[:1].encode(), code[1:].encode()
    loaded = safe_loads(
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        b"\x87R(K\x01K\x05\x85cnumpy\ndtype\nU\x02%bK\x00K\x01\x87R(K\x03U\x01%bNNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89T%b%btbs." % (kind, order, struct.pack("<I", len(data)), data)
    )
    assert list(loaded) == [b"data"] and loaded[b"data"].dtype == array.dtype
    np.testing.assert_array_equal(loaded[b"data"], array)


def test_a_list_in_itself_and_one_that_is_shared_often():
    own, many = [], ()
    own.append(own)
    loaded = safe_loads(pickle.dumps(own))
    assert loaded[0] is loaded
    for _ in range(100):
        many = (many, [many, many])  # 3**100, if each were visited
    assert type(safe_loads(pickle.dumps(many))) is tuple


DTYPE = b"cnumpy\ndtype\n"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n"
EMPTY = ARRAY + b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R"
U1 = DTYPE + b"U\x02u1K\x00K\x01\x87R"
STATE = b"(K\x01%b%b\x89U\x03abctb."
CRAFTED = {
    "asks for posix.system": b"cposix\nsystem\n(U\x09touch rantR.",
    "asks for __builtin__.exec": b"]c__builtin__\nexec\n(U\x0fopen('ran','w')tRa.",
    "for numpy.dtype.type.mro": b"\x80\x04X\x05\0\0\0numpyX\x0e\0\0\0dtype.type.mro\x93.",
    "holds a set": pickle.dumps({1}),
    "an array of dtype O8": pickle.dumps(np.array([None]), 2),
    "an array of another class": ARRAY + DTYPE + b"K\x00\x85U\x01b\x87R.",
    "holds a Array": EMPTY + b".",  # without a state
    "without a dtype": EMPTY + STATE % (b"K\x03\x85", b"N"),
    "an array of 3 bytes, expected 4": EMPTY + STATE % (b"K\x04\x85", U1),
    r"of shape \(-1, -3\)": EMPTY + STATE % (b"J\xff\xff\xff\xffJ\xfd\xff\xff\xff\x86", U1),
    "makes an array by itself": b"cnumpy\nndarray\nK\x03\x85\x85R.",
    "holds a StandIn": b"cnumpy\nndarray\n.",
    "a structured dtype": U1 + b"(K\x03U\x01|NU\x01a}J\xff\xff\xff\xffK\x01K\x01tb.",
    "changes a function": ARRAY + b"}U\x09_functionU\x01xsb.",
    "a key that is a _DType": b"}" + U1 + b"K\x01s.",
    "recursion": b"]" * 100_000 + b"a" * 99_999 + b".",
}


@pytest.mark.parametrize("problem", CRAFTED)
def test_what_would_run_or_is_no_plain_data_is_refused(tmp_path, monkeypatch, problem):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^cannot read the pickle: [^\n]*{problem}"):
        safe_loads(CRAFTED[problem])
    assert not list(tmp_path.iterdir())
    # Nothing of them stays behind, and their parts are right where nothing is wrong.
    found = safe_loads(EMPTY + STATE % (b"K\x03\x85", U1))
    np.testing.assert_array_equal(found, list(b"abc"))


def test_damage_is_said_in_one_line():
    whole = pickle.dumps({"a": np.arange(30), "b": ["x", (1.5, b"y")]}, 2)
    for end in range(len(whole)):
        with pytest.raises(ValueError, match=r"^cannot read the pickle: [^\n]+$"):
            safe_loads(whole[:end])
    random = np.random.default_rng(0)
    for _ in range(500):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[random.integers(0, len(whole), 3)] = random.integers(0, 256, 3)
        # These read a size or a place in memory, which alone may be of gigabytes.
        if not np.any(np.isin(damaged, list(b"rj\x8b\x8d\x8e\x96"))):
            with contextlib.suppress(ValueError):  # and nothing else is raised
                safe_loads(damaged.tobytes())
