"""Models and samples measured: the figures, what they are of, and samples that are kept."""

import json
import re
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from jax_ddpm import runs
from jax_ddpm.data import Dataset, load_dataset
from jax_ddpm.evaluation import FeatureNetwork, save_statistics, statistics
from jax_ddpm.runs import evaluate, evaluate_samples
from jax_ddpm.runs.evaluating import Samples, label_agreement, open_samples, resumed, score
from jax_ddpm.samplers import ddim

pytestmark = pytest.mark.usefixtures("defaults", "untyped")

OPTIONS = {"num": 12, "steps": 2, "num_scored": 0, "batch_size": 4}
FIRST_OF_FOUR = ["00000000", "00000004", "00000008", "00000012"]
SAME = {label: label for label in range(10)}


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    """The classifier learns for a few steps: figures are compared here, not judged."""
    monkeypatch.setattr("jax_ddpm.evaluation.features._STEPS", 10)


@pytest.fixture(scope="module")
def run(untrained):
    """Of ten classes, the last of one character, or j and a caron."""
    run = runs.load_run(untrained / "runs/digits")._replace(class_names=(*"abcdefghi\u01f0",))
    return run._replace(prediction_type="v_prediction")  # or all pixels are ±1


@pytest.fixture(scope="module")
def data():
    """Sixty noisy squares, in ten classes by their brightness."""
    random = np.random.default_rng(0)
    labels = np.arange(60, dtype=np.int32) % 10
    images = random.integers(0, 40, (60, 8, 8, 1)) + 20 * labels[:, None, None, None]
    return Dataset(images.astype(np.uint8), labels)


def test_a_draw_that_was_stopped_resumes_and_grows(run, data, tmp_path):
    """What is on the disk is not drawn again; the record says how to measure again."""
    whole = evaluate(run, data, **OPTIONS)
    json.dumps(whole)
    distance, recipe = "classifier_frechet_distance", whole["recipe"]
    assert whole[distance] > whole["held_out"][distance] and 0 <= whole["agreement"] <= 1
    assert (whole["num"], recipe["steps"], recipe["sampler"]) == (12, 2, "ancestral")
    assert recipe["compared"] == "12 samples" and "the labels of 30" in recipe["features"]
    assert not {"bits_per_dim", "fid"} & {*whole}
    measure = partial(evaluate, run, data, folder=tmp_path / "kept", **OPTIONS)

    def stop(here):
        if here.what == "sampling" and here.done == 4:  # of two batches, two steps each
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(progress=stop)
    seen = []
    assert measure(progress=seen.append) == whole
    assert [here.total for here in seen if here.what == "sampling"][-1] == 4
    more = measure(num=16)
    assert sorted(path.stem for path in (tmp_path / "kept").glob("*.npy")) == FIRST_OF_FOUR
    found = evaluate_samples(tmp_path / "kept", data)
    # One shape of report, and one digest of the samples.
    assert found.keys() == more.keys() and found["recipe"].keys() == more["recipe"].keys()
    digests = [each["recipe"].pop("samples")[-64:] for each in (found, more)]
    assert digests[0] == digests[1] and found == more
    # The recipe knows the sampler and its options, whoever calls.
    with pytest.raises(ValueError, match="sampler was ancestral, is ddim, eta 0.5"):
        measure(sampler=ddim(eta=0.5))


def test_a_gap_is_closed_by_batches_of_another_size(tmp_path):
    """Nothing counts twice; a NaN and a damaged file do not count; other folders are left alone."""
    images = np.random.default_rng(0).uniform(-1.2, 1.2, (16, 2, 2, 1)).astype(np.float32)

    def keep(batch_size, total=16, images=images):
        def draw(first_sample):
            starts = range(first_sample, 16, batch_size)
            return (images[start : start + batch_size] for start in starts)

        return np.concatenate(list(resumed(tmp_path, {}, total, draw)))

    resumed(tmp_path, {}, 16, list)
    with pytest.raises(ValueError, match="samples: expected samples in .*, got none yet"):
        open_samples(tmp_path)
    whole = keep(4)
    np.testing.assert_array_equal(whole, np.round((images.clip(-1, 1) + 1) * 127.5))
    (tmp_path / "00000004.npy").unlink()
    np.testing.assert_array_equal(keep(8), whole)
    assert len(list(tmp_path.glob("*.npy"))) == 4
    np.testing.assert_array_equal(np.concatenate([*open_samples(tmp_path).batches()]), whole)
    np.testing.assert_array_equal(keep(8, total=6, images=None), whole[:6])  # none is drawn
    (tmp_path / "00000004.npy").unlink()
    with pytest.raises(ValueError, match="images: expected finite pixels, got NaN or infinity"):
        keep(8, images=images * np.float32(np.nan))
    assert open_samples(tmp_path).num == 4
    np.save(tmp_path / "00000004.npy", whole[:0])
    with pytest.raises(ValueError, match="samples: cannot read .*04.npy: expected images"):
        open_samples(tmp_path)
    (tmp_path / "00000000.npy").write_bytes(b"damaged")
    new = "expected a new or empty folder"
    for name, words in (("", "cannot read .*00.npy"), ("..", new), ("00000000.npy", new)):
        with pytest.raises(ValueError, match=f"folder: {words}"):
            resumed(tmp_path / name, {}, 16, list)


@pytest.mark.parametrize(
    ("names", "called"),
    [("abcdefghij", "ij"), ("abcdefghij", "89"), (None, "89"), (range(1, 11), ("9", "10"))],
)
def test_classes_go_by_their_names(data, tmp_path, names, called):
    """Samples of the last two of ten classes, in folders by name or number, or in a .npz."""
    images = data.images // 8 + 20 * data.labels[:, None, None, None].astype(np.uint8)
    real = Dataset(images, data.labels, class_names=names and tuple(map(str, names)))
    for label, name in enumerate(called, 8):
        runs.save_samples(tmp_path / "drawn" / name, images[data.labels == label])
    last, all_names = data.labels >= 8, (*map(str, range(8)), *called)
    runs.save_samples(tmp_path / "x.npz", images[last], data.labels[last], names=all_names)
    for drawn in ("drawn", "x.npz"):
        assert evaluate_samples(tmp_path / drawn, real, seed=np.array(2**63 - 1))["agreement"] == 1
    first = evaluate_samples(tmp_path / "x.npz", real, num=10)
    assert first["judged"] == 10 and first["recipe"]["samples"].startswith("10 of the 12 in ")
    with pytest.warns(UserWarning, match=f"no image shows, left out: {called[1]}$"):
        fewer = evaluate_samples(tmp_path / "drawn", replace(real, labels=data.labels % 9))
    assert fewer["judged"] == 6


@pytest.mark.parametrize(
    ("names", "numbers", "said"),
    [
        ("\u01f0ihgfedcba", range(9, -1, -1), ""),
        ("xy\u01f0ihgfedc", [10, 10, *range(9, 1, -1)], "out: a, b.*only images show: x, y"),
        (("e", "j\u030c"), [4, 9], "no image shows, left out: a, b, c, d, f"),
        (None, range(6), "no image shows, left out: g, h, i, "),
        ("15", [1, 5], "no image shows, left out: 0, 2, 3, "),  # of a run without names
    ],
)
def test_a_run_is_measured_by_names(run, data, tmp_path, recwarn, names, numbers, said):
    """Drawn are those that the images show; agreement and likelihood go by their names."""
    labels = data.labels % len(numbers)
    run = run._replace(class_names=None if names == "15" else run.class_names)
    real = replace(data, labels=labels, class_names=names and tuple(names))
    found = evaluate(run, real, **OPTIONS | {"num_scored": 4, "folder": tmp_path / "kept"})
    told = " ".join(str(each.message) for each in recwarn)
    assert re.search(said, told) and bool(told) == bool(said)
    shown = sorted({*numbers} - {10})
    assert open_samples(tmp_path / "kept").labels.tolist() == np.resize(shown, 12).tolist()
    again = evaluate_samples(tmp_path / "kept", real)
    assert (found["judged"], found["agreement"]) == (again["judged"], again["agreement"])
    by_number = replace(data, labels=np.asarray(numbers, np.int32)[labels])  # 10 is of no class
    assert found["bits_per_dim"] == score(run, by_number, SAME, 4, 0, None)


@pytest.mark.filterwarnings("ignore:classes that only images show")
def test_a_run_that_learned_no_class_is_measured_by_its_null_label(run, data):
    """Bits per dimension of four images of the whole file, which need not be the first four."""
    run = run._replace(learned=(), guidance=1.0)
    found = evaluate(run, data, **OPTIONS | {"num_scored": 4})
    of_no_class = replace(data, labels=np.full_like(data.labels, 10))
    assert "agreement" not in found
    assert found["bits_per_dim"] == score(run, of_no_class, SAME, 4, 0, None)
    later = replace(data, images=np.concatenate([data.images[:4], 255 - data.images[4:]]))
    other = evaluate(run, later, num=0, num_scored=4)
    assert {*other} == {"num", "steps", "bits_per_dim", "left_out", "notes", "recipe"}
    assert 1e-3 < abs(other["bits_per_dim"] - found["bits_per_dim"]) < np.inf


def test_a_rare_class_is_judged_too(monkeypatch):
    """Of 1,002 images 100 are drawn; both of the rare class are among them."""
    monkeypatch.setattr("jax_ddpm.runs.evaluating._JUDGED_BY", 100)
    images = np.uint8([0, 100, 255]).reshape(3, 1, 1, 1)
    labels = np.repeat(np.int32([0, 1, 2]), [500, 500, 2])
    for seed in (0, 1, 2, 2**32, 2**63 - 1):  # scikit-learn's own end at 2**32
        found = label_agreement(Dataset(images[labels], labels), images, np.arange(3), seed)
        assert found == {"agreement": 1, "svc_held_out": 1, "judged": 3}


def test_samples_that_no_one_judges_are_not_kept(monkeypatch):
    """Of more than 4,096 numbers, here 3, an image: no batch is there when all are drawn."""
    monkeypatch.setattr("jax_ddpm.runs.evaluating._NUMBERS", 3)
    drawn, alive = [], []

    def batches():
        for _ in range(4):
            images = np.zeros((64, 2, 2, 1), np.uint8)
            drawn.append(weakref.ref(images))
            yield images
        del images
        alive.extend(each() is not None for each in drawn[:2])

    labels = np.arange(256, dtype=np.int32) % 2
    samples = Samples(256, (2, 2, 1), labels, None, {}, batches)
    found = evaluate_samples(samples, Dataset(np.zeros((8, 2, 2, 1), np.uint8), labels[:8]))
    assert "at most 100 classes and 3 numbers" in found["left_out"]["agreement"]
    assert alive == [False, False]


def test_what_cannot_be_measured_is_named(run, data):
    low = replace(data, images=data.images[:, :4])
    for options, words in (
        ({}, "data: expected real images, or reference, got neither"),
        ({"data": low}, r"data: expected images of \(8, 8, 1\), as the samples are"),
        ({"reference": "x.npz"}, "reference: expected Inception's weights"),
        ({"reference": "x.npz", "num_scored": 5}, "num_scored: expected images to score, got none"),
        ({"reference": "x.npz", "statistics": "y.npz"}, "statistics: expected none with reference"),
        ({"data": data, "num": 0, "num_scored": 4, "folder": "kept"}, "num: expected more than 0"),
        ({"sampler": ddim()._replace(name=""), "folder": "kept"}, "sampler: expected one with a"),
    ):
        with pytest.raises(ValueError, match=f"^{words}"):
            evaluate(run, **options)


def test_few_real_images_are_said_to_be_few(monkeypatch, tmp_path):
    """Within the balls of 15 digits lies much of pure noise, within those of 120 none."""
    monkeypatch.setattr("jax_ddpm.evaluation.features._STEPS", 200)
    random, digits = np.random.default_rng(1), load_dataset("digits")
    order = random.permutation(len(digits.images))
    runs.save_samples(tmp_path / "noise.npz", random.integers(0, 256, (120, 8, 8, 1), np.uint8))
    for count, said in ((31, ["precision and recall say little of 15 images"]), (240, [])):
        few = digits[order[:count]]
        found = evaluate_samples(tmp_path / "noise.npz", few, seed=1, agreement=False)
        assert [note.partition(":")[0] for note in found["notes"]] == said
        assert (found["precision"] > 0.3) == bool(said)
        assert found["left_out"] == {"agreement": "it was not asked for"}


def test_statistics_stand_for_images(run, data, tmp_path, monkeypatch):
    """What they cannot say is left out, as what 12 samples cannot; pixels stand for features."""

    def apply_fn(variables, images):
        x = images.reshape(len(images), 64).astype(np.float32)
        return {"2048": x, "64": x, "logits_unbiased": x}

    network = FeatureNetwork(apply_fn, (), "2048", "pixels")
    monkeypatch.setattr("jax_ddpm.runs.evaluating.feature_network", lambda *_: network)
    found = evaluate(run, data, statistics=tmp_path / "x.npz", **OPTIONS)
    again = evaluate(run, reference=tmp_path / "x.npz", **OPTIONS)
    few = evaluate(run, replace(data, images=data.images[:2], labels=None), **OPTIONS)
    assert again["fid_64"] == pytest.approx(found["fid_64"])
    save_statistics(tmp_path / "x.npz", statistics(np.eye(50)))
    with pytest.raises(ValueError, match="reference: .*expected mu of 64, 192, .*got 50"):
        evaluate(run, reference=tmp_path / "x.npz", **OPTIONS)
    rest = {"precision", "recall", "agreement"}
    for each, missing in ((found, {*()}), (again, {"agreement"}), (few, rest)):
        assert each["left_out"].keys() == {"inception_score"} | missing
        for name in missing - {"agreement"} | {"inception_score"}:
            assert each["left_out"][name] == "there are too few samples or images"
    assert "statistics stand for the real images: nothing compares image with " in again["notes"][0]
    for each in (found, again, few):
        assert any("say little of" in note for note in each["notes"]) == ("precision" in each)


LABELS = np.arange(60, dtype=np.int32)
LEFT_OUT = {
    "number of classes has to be greater than one": LABELS * 0,
    "least populated class": np.maximum(LABELS - 52, 0),
    "number of classes = 20": LABELS % 20,
    "at most 2 classes and 4,096 numbers an image, got 3 classes and 64 numbers": LABELS % 3,
    "have no classes in common": None,
    "no classes in common": LABELS % 2 + 20,
}


@pytest.mark.filterwarnings("ignore:classes that ")
@pytest.mark.parametrize(("why", "labels"), LEFT_OUT.items())
def test_what_cannot_be_had_is_left_out(run, data, tmp_path, monkeypatch, why, labels):
    """And said; distances are measured all the same, of a run and of samples."""
    if "at most 2" in why:
        monkeypatch.setattr("jax_ddpm.runs.evaluating._CLASSES", 2)
    real = Dataset(data.images, labels)
    runs.save_samples(tmp_path / "x.npz", data.images[::3], labels=np.zeros(20, np.int32))
    scored = {"num_scored": 4 if labels is None else 0}
    found = [evaluate(run, real, **OPTIONS | scored), evaluate_samples(tmp_path / "x.npz", real)]
    assert ("bits_per_dim" in found[0]["left_out"]) == (labels is None)
    for figures in found:
        assert np.isfinite(figures["classifier_frechet_distance"]) and "agreement" not in figures
        assert why in figures["left_out"]["agreement"]
