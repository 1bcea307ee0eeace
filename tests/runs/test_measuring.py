"""Models and samples measured: the figures, what they are of, and samples that are kept."""

import json
import re
from functools import partial

import jax
import numpy as np
import pytest

from jax_ddpm import runs
from jax_ddpm.data import Dataset, to_float
from jax_ddpm.runs.measuring import evaluate, evaluate_samples, label_agreement
from jax_ddpm.runs.samples import kept_samples, open_kept, open_samples, resumed
from jax_ddpm.runs.scoring import score
from jax_ddpm.samplers import ddim

pytestmark = pytest.mark.usefixtures("defaults", "untyped")

OPTIONS = {"num": 12, "steps": 2, "num_scored": 0, "batch_size": 4}


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    """The classifier learns for a few steps: figures are compared here, not judged."""
    monkeypatch.setattr("jax_ddpm.evaluation.classifier._STEPS", 10)


@pytest.fixture(scope="module")
def run(untrained):
    run = runs.load_run(untrained / "runs/digits")
    return run._replace(prediction_type="v_prediction")  # or all pixels are ±1


@pytest.fixture(scope="module")
def data():
    """Sixty noisy squares, in ten classes by their brightness."""
    random = np.random.default_rng(0)
    labels = np.arange(60, dtype=np.int32) % 10
    images = random.integers(0, 40, (60, 8, 8, 1)) + 20 * labels[:, None, None, None]
    return Dataset(images.astype(np.uint8), labels)


def test_a_draw_that_was_stopped_resumes_and_grows(run, data, tmp_path):
    """What is on the disk is not drawn again, and the figures are those of one piece; the record
    says how to measure again."""
    whole = evaluate(run, data, **OPTIONS)
    json.dumps(whole)
    distance, recipe = "classifier_frechet_distance", whole["recipe"]
    assert whole[distance] > whole["held_out"][distance] and 0 <= whole["agreement"] <= 1
    assert (recipe["num"], recipe["steps"], recipe["sampler"]) == (12, 2, "ancestral")
    assert recipe["compared"] == "12 samples" and "the labels of 30" in recipe["features"]
    assert "bits_per_dim" not in whole and not any("fid" in name for name in whole)
    measure = partial(evaluate, run, data, folder=tmp_path / "kept", **OPTIONS)

    def stop(here):
        if here.what == "sampling" and here.done == 4:  # of two batches, two steps each
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(progress=stop)
    (first,) = (tmp_path / "kept").glob("*.npy")
    before, seen = first.stat().st_mtime_ns, []
    assert measure(progress=seen.append) == whole
    assert first.name == "00000000.npy" and first.stat().st_mtime_ns == before
    assert [here.total for here in seen if here.what == "sampling"][-1] == 4
    more = measure(num=16)
    files = sorted(path.name for path in first.parent.glob("*.npy"))
    assert files == [f"{start:08d}.npy" for start in (0, 4, 8, 12)]
    found = evaluate_samples(tmp_path / "kept", data)
    assert found["recipe"]["weights"] == more["recipe"]["weights"] and found["num"] == 16
    for name in (distance, "precision", "agreement", "svc_held_out"):
        assert found[name] == more[name]
    # The recipe knows the sampler and its options, whoever calls.
    with pytest.raises(ValueError, match="sampler was ancestral, is ddim, eta 0.5"):
        measure(sampler=ddim(eta=0.5))


def test_a_gap_is_closed_by_batches_of_another_size(tmp_path):
    """Samples that other files hold are not counted twice; those with a NaN are not counted."""
    images = np.random.default_rng(0).uniform(-1.2, 1.2, (16, 2, 2, 1)).astype(np.float32)

    def keep(batch_size, total=16, images=images):
        def draw(first_sample):
            starts = range(first_sample, 16, batch_size)
            return (images[start : start + batch_size] for start in starts)

        return np.concatenate(list(resumed(tmp_path, open_kept(tmp_path, {}), total, draw)))

    whole = keep(4)
    np.testing.assert_array_equal(whole, np.round((images.clip(-1, 1) + 1) * 127.5))
    (tmp_path / "00000004.npy").unlink()
    assert kept_samples(tmp_path) == 4
    np.testing.assert_array_equal(keep(8), whole)
    assert len(list(tmp_path.glob("*.npy"))) == 4 and kept_samples(tmp_path) == 16
    np.testing.assert_array_equal(np.concatenate(list(open_samples(tmp_path).batches())), whole)
    np.testing.assert_array_equal(keep(8, total=6, images=None), whole[:6])  # none is drawn
    (tmp_path / "00000004.npy").unlink()
    with pytest.raises(ValueError, match="images: expected finite pixels, got NaN or infinity"):
        keep(8, images=images * np.float32(np.nan))
    assert kept_samples(tmp_path) == 4


def test_other_folders_are_left_alone(tmp_path):
    kept, recipe = tmp_path / "kept", {"steps": 2}
    open_kept(kept, recipe)
    with pytest.raises(ValueError, match="samples: expected samples in .*, got none yet"):
        open_samples(kept)
    (kept / "00000000.npy").write_bytes(b"damaged")
    assert kept_samples(kept) == 0
    for folder, words in ((kept, "cannot read .*00000000.npy"), (tmp_path, "expected a new or em")):
        with pytest.raises(ValueError, match=f"folder: {words}"):
            open_kept(folder, recipe)


NAMES = (("abcdefghij", "ij"), ("abcdefghij", "89"), (None, "89"), (range(1, 11), ("9", "10")))


@pytest.mark.parametrize(("names", "called"), NAMES)
def test_classes_go_by_their_names(data, tmp_path, names, called):
    """Samples of the last two of ten classes, in folders by name or number, or in a .npz."""
    images = data.images // 8 + 20 * data.labels[:, None, None, None].astype(np.uint8)
    real = Dataset(images, data.labels, class_names=names and tuple(map(str, names)))
    for name, label in zip(called, (8, 9), strict=True):
        runs.save_samples(tmp_path / "drawn" / name, images[data.labels == label])
    last, all_names = data.labels >= 8, (*map(str, range(8)), *called)
    runs.save_samples(tmp_path / "x.npz", images[last], data.labels[last], names=all_names)
    for drawn in ("drawn", "x.npz"):
        assert evaluate_samples(tmp_path / drawn, real)["agreement"] == 1
    first = evaluate_samples(tmp_path / "x.npz", real, num=10)
    assert first["judged"] == 10 and first["recipe"]["samples"].startswith("10 of the 12 in ")
    with pytest.warns(UserWarning, match=f"no image shows, left out: {called[1]}$"):
        fewer = evaluate_samples(tmp_path / "drawn", real._replace(labels=data.labels % 9))
    assert fewer["judged"] == 6


@pytest.mark.parametrize(
    ("names", "numbers", "said"),
    [
        ("\u01f0ihgfedcba", range(9, -1, -1), ""),
        ("xy\u01f0ihgfedc", [10, 10, *range(9, 1, -1)], "out: a, b.*only images show: x, y"),
        (("e", "j\u030c"), [4, 9], "no image shows, left out: a, b, c, d, f"),
        (None, range(6), "no image shows, left out: g, h, i, "),
    ],
)
def test_a_run_is_measured_by_names(run, data, tmp_path, recwarn, names, numbers, said):
    """Drawn are those that the images show; agreement and likelihood go by their names."""
    run, labels = run._replace(class_names=(*"abcdefghi\u01f0",)), data.labels % len(numbers)
    real = data._replace(labels=labels, class_names=names and tuple(names))
    found = evaluate(run, real, **OPTIONS | {"num_scored": 4, "folder": tmp_path / "kept"})
    assert re.search(said, " ".join(str(each.message) for each in recwarn))
    assert bool(recwarn) == bool(said)
    shown = sorted({*numbers} - {10})
    assert open_samples(tmp_path / "kept").labels.tolist() == np.resize(shown, 12).tolist()
    again = evaluate_samples(tmp_path / "kept", real)
    assert (found["judged"], found["agreement"]) == (again["judged"], again["agreement"])
    by_number = data._replace(labels=np.asarray(numbers, np.int32)[labels])  # 10 is of no class
    assert found["bits_per_dim"] == score(jax.random.key(0), run, by_number, 4, 0, None)


@pytest.mark.filterwarnings("ignore:classes that only images show")
def test_a_run_that_learned_no_class_is_measured_by_its_null_label(run, data):
    """Bits per dimension of four images of the whole file, which need not be the first four."""
    run = run._replace(learned=(), guidance=1.0)
    found = evaluate(run, data, **OPTIONS | {"num_scored": 4})
    of_no_class = data._replace(labels=np.full_like(data.labels, 10))
    assert "agreement" not in found
    assert found["bits_per_dim"] == score(jax.random.key(0), run, of_no_class, 4, 0, None)
    later = data._replace(images=np.concatenate([data.images[:4], 255 - data.images[4:]]))
    other = evaluate(run, later, num=0, num_scored=4)
    assert set(other) == {"steps", "bits_per_dim", "left_out", "recipe"}
    assert 1e-3 < abs(other["bits_per_dim"] - found["bits_per_dim"]) < np.inf


def test_a_rare_class_is_judged_too(monkeypatch):
    """Of 1,002 images 100 are drawn; both of the rare class are among them."""
    monkeypatch.setattr("jax_ddpm.runs.measuring._JUDGED_BY", 100)
    labels = np.repeat(np.arange(3, dtype=np.int32), [500, 500, 2])
    images = np.asarray([0, 100, 255], np.uint8).reshape(3, 1, 1, 1)
    data = Dataset(images[labels], labels)
    for seed in (0, 1, 2, 2**32, 2**63 - 1):  # scikit-learn's own end at 2**32
        assert label_agreement(data, to_float(images), np.arange(3), seed) == (1, 1)


def test_what_cannot_be_measured_is_named(run, data, tmp_path):
    np.save(tmp_path / "x.npy", data.images[:20])
    floats = data._replace(images=np.float32(data.images) / 255)
    low = data._replace(images=data.images[:, :4])
    model, samples = partial(evaluate, run), partial(evaluate_samples, tmp_path / "x.npy")
    for call, words in (
        (partial(model, data, num=0, folder=tmp_path), "num: expected more than 0 with folder"),
        (partial(model, floats, num=4, num_scored=5), "num_scored: expected images of 8 bits"),
        (partial(model, num=4), "data: expected real images, or reference, got neither"),
        (partial(model, low), r"data: expected images of \(8, 8, 1\), as the run's"),
        (partial(samples, data, statistics="x.npz"), "statistics: expected Inception's weights"),
        (partial(samples, reference="x.npz"), "reference: statistics are of Inception's features"),
    ):
        with pytest.raises(ValueError, match=f"^{words}"):
            call()


LABELS = np.arange(60, dtype=np.int32)
LEFT_OUT = {
    "60 images in 1 classes": LABELS * 0,
    "1 in the smallest": np.maximum(LABELS - 52, 0),
    "60 images in 20 classes, 3 in": LABELS % 20,
    "2 images in 2 classes": LABELS[:2],
    "have no classes": None,
}


@pytest.mark.filterwarnings("ignore:classes that ")
@pytest.mark.parametrize(("why", "labels"), LEFT_OUT.items())
def test_what_cannot_be_had_is_left_out(run, data, tmp_path, why, labels):
    """And said; distances are measured all the same, of a run and of samples."""
    real = Dataset(data.images[: 60 if labels is None else len(labels)], labels)
    runs.save_samples(tmp_path / "x.npz", data.images[::3], labels=np.zeros(20, np.int32))
    scored = {"num_scored": None if labels is None else 0}
    found = [evaluate(run, real, **OPTIONS | scored), evaluate_samples(tmp_path / "x.npz", real)]
    assert ("bits_per_dim" in found[0]["left_out"]) == (labels is None)
    for figures in found:
        assert np.isfinite(figures["classifier_frechet_distance"]) and "agreement" not in figures
        assert why in figures["left_out"]["agreement"]
        assert ("recall" in figures) != ("recall" in figures["left_out"])
