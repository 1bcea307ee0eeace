"""Models and samples measured: the figures, what they are of, and samples that are kept."""

import json
from functools import partial

import numpy as np
import pytest

from jax_ddpm import runs
from jax_ddpm.data import Dataset, load_dataset, to_float
from jax_ddpm.runs.measuring import evaluate, evaluate_samples, label_agreement
from jax_ddpm.runs.samples import kept_samples, open_kept, open_samples, resumed
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
    pretrained = run.pretrained._replace(prediction_type="v_prediction")  # or all pixels are ±1
    return run._replace(pretrained=pretrained)


@pytest.fixture(scope="module")
def data():
    """Sixty noisy squares, in ten classes by their brightness."""
    random = np.random.default_rng(0)
    labels = np.arange(60, dtype=np.int32) % 10
    images = random.integers(0, 40, (60, 8, 8, 1)) + 20 * labels[:, None, None, None]
    return Dataset(images.astype(np.uint8), labels)


def test_the_record_says_how_to_measure_again(run, data):
    figures = evaluate(run, data, **OPTIONS)
    json.dumps(figures)
    distance = "classifier_frechet_distance"
    assert figures[distance] > figures["held_out"][distance] and 0 <= figures["agreement"] <= 1
    recipe = figures["recipe"]
    assert (recipe["num"], recipe["steps"], recipe["sampler"]) == (12, 2, "ancestral")
    assert recipe["compared"] == "12 samples" and "the labels of 30" in recipe["features"]
    assert "bits_per_dim" not in figures and not any("fid" in name for name in figures)


def test_a_draw_that_was_stopped_resumes_and_grows(run, data, tmp_path):
    """What is on the disk is not drawn again, and the figures are those of one piece."""
    whole = evaluate(run, data, **OPTIONS)
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
    for name in ("classifier_frechet_distance", "precision", "agreement", "svc_held_out"):
        assert found[name] == more[name]
    # The recipe knows the sampler and its options, whoever calls.
    with pytest.raises(ValueError, match="sampler was ancestral, is ddim, eta 0.5"):
        measure(sampler=ddim(eta=0.5))


def test_a_gap_is_closed_by_batches_of_another_size(tmp_path):
    """Samples that other files hold are not counted twice; those with a NaN are not counted."""
    images = np.random.default_rng(0).uniform(-1, 1, (16, 2, 2, 1)).astype(np.float32)

    def keep(batch_size, total=16, images=images):
        def draw(first_sample):
            starts = range(first_sample, 16, batch_size)
            return (images[start : start + batch_size] for start in starts)

        return np.concatenate(list(resumed(tmp_path, open_kept(tmp_path, {}), total, draw)))

    whole = keep(4)
    np.testing.assert_array_equal(whole, np.round((images + 1) * 127.5))
    (tmp_path / "00000004.npy").unlink()
    assert kept_samples(tmp_path) == 4
    np.testing.assert_array_equal(keep(8), whole)
    assert len(list(tmp_path.glob("*.npy"))) == 4 and kept_samples(tmp_path) == 16
    np.testing.assert_array_equal(np.concatenate(list(open_samples(tmp_path).batches())), whole)
    np.testing.assert_array_equal(keep(8, total=6, images=None), whole[:6])  # none is drawn
    (tmp_path / "00000004.npy").unlink()
    with pytest.raises(ValueError, match="run: expected finite samples, got NaN or infinity"):
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


def test_the_images_scored_are_of_the_whole_file(run, data):
    """Bits per dimension of four images, which need not be the first four."""
    later = data._replace(images=np.concatenate([data.images[:4], 255 - data.images[4:]]))
    figures, other = (evaluate(run, each, num=0, num_scored=4) for each in (data, later))
    assert set(figures) == {"steps", "bits_per_dim", "recipe"}
    assert 1e-3 < abs(other["bits_per_dim"] - figures["bits_per_dim"]) < np.inf


def test_samples_of_others_are_measured(data, tmp_path):
    """A .npz as they are saved here, an array, and pictures: the same samples."""
    chosen = np.random.default_rng(0).permutation(60)[:20]
    images, labels = data.images[chosen], data.labels[chosen]
    runs.save_samples(tmp_path / "x.npz", images.astype(np.float32) / 127.5 - 1, labels)
    np.save(tmp_path / "x.npy", images)
    runs.save_samples(tmp_path / "pictures", images)
    for name in ("x.npz", "x.npy", "pictures"):
        np.testing.assert_array_equal(*open_samples(tmp_path / name).batches(), images)
    assert load_dataset(tmp_path / "x.npz").images.dtype == np.float32, "not the rounded arr_0"
    figures = evaluate_samples(tmp_path / "x.npz", data, num=10)
    assert figures["agreement"] > 0.3 and figures["judged"] == 10
    assert figures["recipe"]["samples"].startswith("10 of the 20 in ")


def test_classes_go_by_their_names(data, tmp_path):
    """Samples of the last two of ten classes, in folders: the first of them is the ninth."""
    images = data.images // 8 + 20 * data.labels[:, None, None, None].astype(np.uint8)
    real = Dataset(images, data.labels, class_names=tuple("abcdefghij"))
    for name, label in (("i", 8), ("j", 9)):
        runs.save_samples(tmp_path / "drawn" / name, images[data.labels == label])
    assert evaluate_samples(tmp_path / "drawn", real)["agreement"] == 1
    (tmp_path / "drawn/j").rename(tmp_path / "drawn/k")
    with pytest.raises(ValueError, match="samples: expected classes of a, b, .*, got k"):
        evaluate_samples(tmp_path / "drawn", real)


def test_a_rare_class_is_judged_too(monkeypatch):
    """Of 1,002 images 100 are drawn; both of the rare class are among them."""
    monkeypatch.setattr("jax_ddpm.runs.measuring._JUDGED_BY", 100)
    labels = np.repeat(np.arange(3, dtype=np.int32), [500, 500, 2])
    images = np.asarray([0, 100, 255], np.uint8).reshape(3, 1, 1, 1)
    data = Dataset(images[labels], labels)
    for seed in range(5):
        assert label_agreement(data, to_float(images), np.arange(3), seed) == (1, 1)


def test_what_cannot_be_measured_is_named(run, data, tmp_path):
    np.save(tmp_path / "x.npy", data.images[:20])
    floats = data._replace(images=np.float32(data.images) / 255)
    few, low = Dataset(data.images[:40], data.labels[:40]), data._replace(images=data.images[:, :4])
    model, samples = partial(evaluate, run), partial(evaluate_samples, tmp_path / "x.npy")
    for call, words in (
        (partial(model, data, num=0, folder=tmp_path), "num: expected more than 0 with folder"),
        (partial(model, floats, num=4, num_scored=5), "num_scored: expected images of 8 bits"),
        (partial(model, num=4), "data: expected real images, or reference, got neither"),
        (partial(model, few), "data: too few images for 10 classes"),
        (partial(model, low), r"data: expected images of \(8, 8, 1\), as the run's"),
        (partial(model, data._replace(labels=data.labels + 1)), "data: expected labels up to 9"),
        (partial(model, data._replace(labels=None)), "data: expected labels, since the run has cl"),
        (partial(samples, low), r"data: expected images of \(8, 8, 1\), as the samples"),
        (partial(samples, data, statistics="x.npz"), "statistics: expected Inception's weights"),
        (partial(samples, reference="x.npz"), "reference: statistics are of Inception's features"),
    ):
        with pytest.raises(ValueError, match=f"^{words}"):
            call()
