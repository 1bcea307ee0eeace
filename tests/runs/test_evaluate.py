"""Models and samples measured: what is reported, kept, resumed and refused, also in a training."""

import json

import numpy as np
import pytest

from jax_ddpm import runs
from jax_ddpm.data import Dataset, to_bytes
from jax_ddpm.models import ddpm_digits
from jax_ddpm.runs import samples
from jax_ddpm.runs.measuring import evaluate, evaluate_samples
from jax_ddpm.runs.watching import best_line
from jax_ddpm.samplers import ddim

pytestmark = pytest.mark.usefixtures("defaults", "untyped")


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_run, defaults):
    model = ddpm_digits(block_out_channels=(8, 8), sample_size=8)
    return write_run(tmp_path_factory.mktemp("run") / "run", model, num_classes=10)


@pytest.fixture(scope="module")
def data():
    """Sixty noisy squares, in ten classes by their brightness."""
    random = np.random.default_rng(0)
    labels = np.arange(60, dtype=np.int32) % 10
    images = random.integers(0, 40, (60, 8, 8, 1)) + 20 * labels[:, None, None, None]
    return Dataset(images.astype(np.uint8), labels)


def test_what_is_measured_can_be_measured_again(run, data):
    """The same figures; and the record says with what."""
    options = {"num": 12, "steps": 3, "num_scored": 4}
    figures = evaluate(run, data, **options)
    assert evaluate(run, data, **options) == figures
    assert (
        figures["classifier_frechet_distance"] > figures["held_out"]["classifier_frechet_distance"]
    )
    assert 0 <= figures["agreement"] <= 1 and np.isfinite(figures["bits_per_dim"])
    recipe = figures["recipe"]
    assert (recipe["num"], recipe["steps"], recipe["sampler"]) == (12, 3, "ancestral")
    assert recipe["compared"] == "12 samples" and "the labels of 30" in recipe["features"]
    assert not any("fid" in name for name in figures)
    json.dumps(figures)
    alone = evaluate(run, data, num=0, steps=3, num_scored=4)
    assert set(alone) == {"steps", "bits_per_dim", "recipe"}
    assert alone["bits_per_dim"] == figures["bits_per_dim"]


def test_a_draw_that_was_stopped_resumes(run, data, tmp_path, monkeypatch):
    """The samples on the disk are not drawn again, and the figures are those of one piece."""
    options = {"num": 24, "steps": 3, "num_scored": 0, "batch_size": 8}
    whole = evaluate(run, data, **options)
    folder = tmp_path / "kept"

    def stop(here):
        if here.what == "sampling" and here.done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(run, data, folder=folder, progress=stop, **options)
    kept = sorted(path.name for path in folder.glob("*.npy"))
    assert kept == ["00000000.npy"], kept
    before = (folder / kept[0]).stat().st_mtime_ns
    seen = []
    again = evaluate(run, data, folder=folder, progress=seen.append, **options)
    assert again == whole
    assert (folder / kept[0]).stat().st_mtime_ns == before
    assert [here.total for here in seen if here.what == "sampling"][-1] == 6
    # All are there now; more can be drawn, and others measured from the folder.
    more = evaluate(run, data, folder=folder, **{**options, "num": 32})
    assert len(list(folder.glob("*.npy"))) == 4
    found = evaluate_samples(folder, data)
    assert found["recipe"]["weights"] == more["recipe"]["weights"]
    names = ("classifier_frechet_distance", "precision", "agreement", "svc_held_out")
    assert {name: found[name] for name in names} == {name: more[name] for name in names}
    with pytest.raises(ValueError, match="folder: .* other samples: steps was 3, is 2; choose ano"):
        evaluate(run, data, folder=folder, **{**options, "steps": 2})
    (tmp_path / "x").mkdir()
    (tmp_path / "x/y").touch()
    with pytest.raises(ValueError, match="folder: expected a new or empty folder, got"):
        evaluate(run, data, folder=tmp_path / "x", **options)


def test_a_half_written_batch_is_drawn_again(run, data, tmp_path):
    options = {"num": 16, "steps": 2, "num_scored": 0, "batch_size": 8}
    whole = evaluate(run, data, folder=tmp_path / "kept", **options)
    (tmp_path / "kept/00000008.npy").unlink()
    assert evaluate(run, data, folder=tmp_path / "kept", **options) == whole
    (tmp_path / "kept/00000008.npy").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot read .*00000008.npy"):
        evaluate(run, data, folder=tmp_path / "kept", **options)


def test_samples_of_others_are_measured(data, tmp_path):
    """A .npz as they are saved here, an array, and pictures: the same samples, the same figures."""
    chosen = np.random.default_rng(0).permutation(60)[:20]
    images, labels = data.images[chosen], data.labels[chosen]
    runs.save_samples(tmp_path / "x.npz", images.astype(np.float32) / 127.5 - 1, labels)
    np.save(tmp_path / "x.npy", images)
    runs.save_samples(tmp_path / "pictures", images)
    found = [evaluate_samples(tmp_path / name, data) for name in ("x.npz", "x.npy", "pictures")]
    for figures in found[1:]:
        name = "classifier_frechet_distance"
        assert figures[name] == pytest.approx(found[0][name], rel=1e-5)
    assert found[0]["agreement"] > 0.3 and "agreement" not in found[1]
    recipe = evaluate_samples(tmp_path / "x.npy", data, num=10)["recipe"]
    assert recipe["samples"].startswith("10 of the 20 in ") and recipe["split seed"] == 0
    for call, words in (
        (lambda: evaluate_samples(tmp_path / "no.npz", data), "samples: no such file or folder"),
        (lambda: evaluate_samples(tmp_path / "x.npy", data, num=21), "num: expected at most 20"),
        (lambda: evaluate_samples(tmp_path / "x.npy"), "data: expected real images, or reference"),
        (
            lambda: evaluate_samples(tmp_path / "x.npy", data._replace(images=data.images[:, :4])),
            r"data: expected images of \(8, 8, 1\), as the samples, got \(4, 8, 1\)",
        ),
        (
            lambda: evaluate_samples(tmp_path / "x.npy", data, inception="x.pth"),
            "inception: expected images of 3 channels",
        ),
        (
            lambda: evaluate_samples(tmp_path / "x.npy", data, statistics="x.npz"),
            "statistics: expected Inception's weights and real images, got no weights",
        ),
        (
            lambda: evaluate_samples(tmp_path / "x.npy", reference="x.npz"),
            "reference: statistics are of Inception's features, and come with inception: FID's",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_folder_without_samples_says_so(tmp_path):
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(ValueError, match="samples: expected samples in .*, got none yet"):
        samples.open_samples(tmp_path)


def settings(steps=150, **options):
    values = {"model": "simple", "batch_size": 4, "timesteps": 4, "checkpoint_every": 60}
    return runs.Settings(**values, steps=steps, sample_every=0, **options)


def test_a_training_is_watched_and_its_best_is_kept(data, tmp_path):
    """Figures every 50 steps; the same weights as without them; stopped and resumed, the same
    lines; and of all checkpoints but the newest the best is left."""
    watch = {"evaluate_every": 50, "evaluate_num": 12, "keep_best": True, "keep": 1}
    end = runs.fit(tmp_path / "watched", data, settings(**watch))
    plain = runs.fit(tmp_path / "plain", data, settings(keep=1))
    for name in ("params", "ema"):
        path = f"checkpoints/00000150/{name}.safetensors"
        one, other = (tmp_path / folder / path for folder in ("watched", "plain"))
        assert one.read_bytes() == other.read_bytes()
    assert end.step == plain.step == 150
    lines = runs.read_metrics(tmp_path / "watched/metrics.jsonl")
    found = [line["classifier_frechet_distance"] for line in lines]
    assert [line["step"] for line in lines] == [50, 100, 150] and all(np.isfinite(found))
    best, name = best_line(lines)
    assert best[name] == min(found)
    kept = {int(path.name) for path in (tmp_path / "watched/checkpoints").iterdir()}
    assert kept == {150, best["step"]}
    # The figures are of the average of the weights: that of the best checkpoint gives them again.
    run = runs.load_run(tmp_path / "watched", checkpoint=best["step"])
    assert run.image_shape == (8, 8, 1)

    soon = iter([False] * 109 + [True])
    stopped = runs.fit(tmp_path / "stopped", data, settings(**watch), stop=lambda: next(soon))
    assert stopped.stopped
    runs.fit(tmp_path / "stopped", data, settings(**watch))
    again = runs.read_metrics(tmp_path / "stopped/metrics.jsonl")
    assert [line["classifier_frechet_distance"] for line in again] == found
    assert {int(path.name) for path in (tmp_path / "stopped/checkpoints").iterdir()} == kept


def test_settings_of_watching_are_checked(data, tmp_path):
    for options, words in (
        ({"evaluate_every": 30}, "evaluate_every: expected a multiple of 50, the steps of a line"),
        ({"keep_best": True}, "keep_best: comes with evaluate_every"),
        ({"evaluate_every": 50, "evaluate_num": 0}, "evaluate_num: expected more than 0"),
    ):
        with pytest.raises(ValueError, match=words):
            settings(**options)
    missing = settings(evaluate_every=50, inception=tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="inception: expected images of 3 channels"):
        runs.fit(tmp_path / "x", data, missing)
    assert not list((tmp_path / "x/checkpoints").iterdir())


def test_bytes_are_what_a_picture_holds():
    x = np.asarray([-2, -1, 0, 1, 2], np.float32).reshape(1, 1, 5, 1)
    assert to_bytes(x).ravel().tolist() == [0, 0, 128, 255, 255]


def test_another_rule_is_another_draw(run, data, tmp_path):
    """The recipe knows the sampler and its options, whoever calls."""
    options = {"num": 8, "steps": 2, "num_scored": 0, "folder": tmp_path / "kept"}
    figures = evaluate(run, data, **options)
    assert figures["recipe"]["sampler"] == "ancestral"
    with pytest.raises(ValueError, match="sampler was ancestral, is ddim, eta 0.5"):
        evaluate(run, data, sampler=ddim(eta=0.5), **options)


def test_classes_go_by_their_names(data, tmp_path):
    """Samples of the last two of three classes, in folders: the first of them is the second."""
    images = data.images[:30]
    labels = np.arange(30, dtype=np.int32) % 3
    images = images // 8 + 100 * labels[:, None, None, None].astype(np.uint8)
    real = Dataset(images, labels, class_names=("a", "b", "c"))
    for name in ("b", "c"):
        chosen = images[labels == "abc".index(name)]
        runs.save_samples(tmp_path / "drawn" / name, chosen)
    assert evaluate_samples(tmp_path / "drawn", real)["agreement"] == 1
    (tmp_path / "drawn/c").rename(tmp_path / "drawn/d")
    with pytest.raises(ValueError, match="samples: expected classes of a, b, c, .*, got d"):
        evaluate_samples(tmp_path / "drawn", real)


def test_samples_that_are_no_numbers_are_refused(run, data, tmp_path):
    import jax

    variables = jax.tree.map(lambda x: x * np.nan, run.pretrained.variables)
    wrong = run._replace(pretrained=run.pretrained._replace(variables=variables))
    options = {"num": 4, "steps": 2, "num_scored": 0, "folder": tmp_path / "kept"}
    with pytest.raises(ValueError, match="run: expected finite samples, got NaN or infinity"):
        evaluate(wrong, data, **options)
    assert not list((tmp_path / "kept").glob("*.npy"))


def test_what_cannot_be_measured_is_named(run, data, tmp_path):
    floats = data._replace(images=np.float32(data.images) / 255)
    for call, words in (
        (lambda: evaluate(run, data, num=0, folder=tmp_path), "num: expected more than 0 with fo"),
        (lambda: evaluate(run, floats, num=4, num_scored=5), "num_scored: expected images of 8 b"),
        (lambda: evaluate(run, data, seed=-1), "seed: expected 0 or more, got -1"),
        (lambda: evaluate(run, num=4), "data: expected real images, or reference, got neither"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_batches_of_another_size_close_a_gap(run, data, tmp_path):
    options = {"num": 20, "steps": 2, "num_scored": 0, "folder": tmp_path / "kept"}
    whole = evaluate(run, data, batch_size=8, **options)
    (tmp_path / "kept/00000008.npy").unlink()
    again = evaluate(run, data, batch_size=16, **options)
    assert again["classifier_frechet_distance"] == pytest.approx(
        whole["classifier_frechet_distance"], rel=1e-3
    )
    assert samples.open_samples(tmp_path / "kept").num == 20
