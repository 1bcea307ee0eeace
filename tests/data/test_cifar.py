"""CIFAR's files, made byte by byte."""

import io
import pickle
import tarfile

import numpy as np
import pytest

from jax_ddpm.data.cifar import is_cifar, read_cifar
from jax_ddpm.data.files import open_files

TEN = [f"class{number}" for number in range(10)]
HUNDRED = [f"fine_{number}" for number in range(100)]


def pixels(seed, count=2):
    """Red, then green, then blue, each row by row."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), np.uint8)


def binary(seed, *labels):
    rows = pixels(seed)
    return b"".join(bytes(each) + row.tobytes() for each, row in zip(labels, rows, strict=True))


def pickled(**values):
    return pickle.dumps({key.encode(): value for key, value in values.items()}, 2)


def ten_binary():
    files = {f"data_batch_{n}.bin": binary(n, [n], [9 - n]) for n in range(1, 6)}
    names = "\n".join(TEN).encode() + b"\n\n"
    rest = {"test_batch.bin": binary(0, [0], [0]), "batches.meta.txt": names, "readme.html": b"<"}
    return {f"cifar-10-batches-bin/{name}": data for name, data in (files | rest).items()}


def ten_pickled():
    def batch(number, *labels):
        data = pixels(number)
        names = [b"a.png", b"b.png"]
        return pickled(data=data, labels=[*labels], filenames=names, batch_label=b"batch")

    files = {f"data_batch_{n}": batch(n, n, 9 - n) for n in range(1, 6)}
    names = [name.encode() for name in TEN]
    meta = pickled(label_names=names, num_vis=3072, num_cases_per_batch=10000)
    rest = {"test_batch": batch(0, 0, 0), "batches.meta": meta, "readme.html": b"<"}
    return {f"cifar-10-batches-py/{name}": data for name, data in (files | rest).items()}


def hundred_binary():
    files = {
        "train.bin": binary(1, [19, 98], [3, 4]),
        "test.bin": binary(0, [0, 0], [0, 0]),
        "fine_label_names.txt": "\n".join(HUNDRED).encode() + b"\n",
        "coarse_label_names.txt": b"coarse\n" * 20,
    }
    return {f"cifar-100-binary/{name}": data for name, data in files.items()}


def hundred_pickled():
    def batch(seed, *labels):
        return pickled(data=pixels(seed), fine_labels=[*labels], coarse_labels=[19, 3])

    meta = pickled(
        fine_label_names=[name.encode() for name in HUNDRED], coarse_label_names=[b"c"] * 20
    )
    files = {"train": batch(1, 98, 4), "test": batch(0, 0, 0), "meta": meta, "file.txt~": b""}
    return {f"cifar-100-python/{name}": data for name, data in files.items()}


MAKERS = {
    "cifar-10-binary": ten_binary,
    "cifar-10-python": ten_pickled,
    "cifar-100-binary": hundred_binary,
    "cifar-100-python": hundred_pickled,
}


@pytest.fixture(params=MAKERS)
def version(request):
    return request.param


def write(path, files, place="folder"):
    """As a folder, the one that is in it, or a tar."""
    if place == "tar":
        path = path.with_name(path.name + ".tar.gz")
        with tarfile.open(path, "w:gz", compresslevel=1) as archive:
            # As published, the batches are in no order.
            for name, data in sorted(files.items(), key=lambda file: file[0][::-1]):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return open_files(path)
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return open_files(path / next(iter(files)).partition("/")[0] if place == "inner" else path)


@pytest.mark.parametrize("place", ["folder", "inner", "tar"])
def test_the_training_batches_are_read_in_order(tmp_path, version, place):
    files = write(tmp_path / "x", MAKERS[version](), place)
    assert is_cifar(files.names)
    images, labels, names, note = read_cifar(files)
    is_ten = "-10-" in version
    seeds = range(1, 6) if is_ten else [1]
    expected = np.concatenate([pixels(seed) for seed in seeds])
    assert images.dtype == np.uint8
    assert images.shape == (len(expected), 32, 32, 3)
    for channel in range(3):
        for row in (0, 1, 31):
            start = 1024 * channel + 32 * row
            np.testing.assert_array_equal(
                images[:, row, :, channel], expected[:, start : start + 32]
            )
    assert labels.dtype == np.int32
    assert labels.tolist() == ([1, 8, 2, 7, 3, 6, 4, 5, 5, 4] if is_ten else [98, 4])
    assert names == tuple(TEN if is_ten else HUNDRED)
    title = "CIFAR-10" if is_ten else "CIFAR-100"
    assert note == f"{title}: the training images; those of the test are left out"


def test_python_3_may_have_written_them_too(tmp_path):
    files = {
        name: pickle.dumps({key.decode(): each for key, each in value.items()})
        for name, data in ten_pickled().items()
        if not name.endswith("html")
        for value in [pickle.loads(data)]
    }
    images, labels, names, _ = read_cifar(write(tmp_path, files))
    assert images.shape == (10, 32, 32, 3)
    assert labels[0] == 1
    assert names == tuple(TEN)


def test_names_may_be_missing_and_the_test(tmp_path):
    kept = {name: data for name, data in ten_binary().items() if "data_batch" in name}
    _, _, names, note = read_cifar(write(tmp_path, kept))
    assert names is None
    assert note == "CIFAR-10: the training images"


def test_other_files_are_not_taken_for_these():
    for names in (
        [],
        ["train/1.png", "test/1.png", "meta/1.png"],
        ["train.bin", "val.bin"],
        ["a/train", "b/meta"],
    ):
        assert not is_cifar(names)


def fails(files, *parts):
    with pytest.raises(ValueError) as caught:
        read_cifar(files)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_missing_batches_are_named(tmp_path):
    files = ten_binary()
    del (
        files["cifar-10-batches-bin/data_batch_3.bin"],
        files["cifar-10-batches-bin/data_batch_5.bin"],
    )
    fails(write(tmp_path, files), "data_batch_3.bin, data_batch_5.bin", str(tmp_path))


def test_several_data_sets_are_named(tmp_path):
    files = write(tmp_path, ten_binary() | hundred_pickled())
    fails(
        files, "expected one CIFAR", "cifar-10-batches-bin/data_batch_1.bin, cifar-100-python/train"
    )
    (tmp_path / "none").mkdir()
    fails(open_files(tmp_path / "none"), "expected one CIFAR", "got none")


@pytest.mark.parametrize("version", ["cifar-10-binary", "cifar-100-binary"])
@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data + b"x", lambda _: b""]
)
def test_records_that_are_cut_are_named(tmp_path, version, change):
    files = MAKERS[version]()
    name = next(name for name in files if "batch_1" in name or "train" in name)
    files[name] = change(files[name])
    size = 3073 if "-10-" in version else 3074
    fails(write(tmp_path, files), f"{name} in {tmp_path}: expected records of {size} bytes, got ")


def test_labels_out_of_range_are_named(tmp_path):
    files = ten_binary()
    files["cifar-10-batches-bin/data_batch_2.bin"] = binary(1, [10], [3])
    fails(write(tmp_path, files), "data_batch_2.bin", "expected labels from 0 to 9, got 3 to 10")


def test_names_that_do_not_fit_are_named(tmp_path):
    files = ten_binary()
    files["cifar-10-batches-bin/batches.meta.txt"] = b"a\nb\n"
    fails(write(tmp_path, files), "batches.meta.txt: expected 10 names, got 2")


FORMS = [
    (pickled(labels=[1, 2]), "expected data of uint8, got nothing"),
    (pickled(data=pixels(1).astype("f4"), labels=[1, 2]), "got float32[2, 3072]"),
    (pickled(data=pixels(1)[:, 1:], labels=[1, 2]), "[image, 3072], got uint8[2, 3071]"),
    (pickled(data=pixels(1)[:0], labels=[]), "got uint8[0, 3072]"),
    (pickled(data=pixels(1)), "expected labels as whole numbers, got nothing"),
    (pickled(data=pixels(1), labels=[1, b"2"]), "expected labels as whole numbers, got a list"),
    (pickled(data=pixels(1), labels=[1, 2, 3]), "expected 2 labels, got 3"),
    (pickled(data=pixels(1), labels=[1, 2**70]), "expected labels from 0 to 9, got 1 to "),
    (pickle.dumps([1], 2), "expected a dict, got a list"),
    (pickle.dumps({1: 2}, 2), "expected a dict, got a dict"),
    (pickled(data=pixels(1), labels=[1, 2])[:-5], "cannot read the pickle: "),
    (b"cposix\nsystem\nU\x01x\x85R.", "it asks for posix.system, which is refused"),
]


@pytest.mark.parametrize("batch, problem", FORMS, ids=[problem for _, problem in FORMS])
def test_batches_of_another_form_are_named(tmp_path, batch, problem):
    files = ten_pickled()
    name = "cifar-10-batches-py/data_batch_1"
    files[name] = batch
    fails(write(tmp_path, files), f"{name} in {tmp_path}: ", problem)


def test_names_of_another_form_are_named(tmp_path):
    files = ten_pickled()
    files["cifar-10-batches-py/batches.meta"] = pickled(label_names=[1] * 10)
    fails(write(tmp_path, files), "batches.meta: expected the names of the classes, got a list")
