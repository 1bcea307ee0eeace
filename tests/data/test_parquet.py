"""Sets as Hugging Face's `datasets` writes them: the same images as of the files themselves."""

import shutil

import numpy as np
import pytest

from jax_ddpm._checks import FieldError
from jax_ddpm.data import Preparation, load_dataset

pytestmark = pytest.mark.usefixtures("untyped")
PREPARATION = Preparation(image_size=16, channels=3)


def load(path):
    return load_dataset(path, PREPARATION, cache="none")


def test_hugging_faces_sets(few, tmp_path, monkeypatch):
    """A Parquet file as `datasets` writes it, and one that knows nothing of images."""
    datasets = pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    expected = load(few)
    classes = list(expected.class_names)
    files = (path for path in few.rglob("*.*") if path.suffix != ".txt" and path.name[0] != ".")
    files = sorted(files, key=lambda path: path.relative_to(few).parts)
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
    rows = {"image": list(map(str, files)), "label": expected.labels.tolist()}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    made.to_parquet(tmp_path / "set/train-00000.parquet")
    # Splits that stand in the names of folders, as the hub's own conversion has them.
    for split in ("train", "test"):
        (tmp_path / f"hub/{split}").mkdir(parents=True)
        shutil.copy(tmp_path / "set/train-00000.parquet", tmp_path / f"hub/{split}/0.parquet")
    cells = {
        "img": [{"bytes": path.read_bytes(), "path": None} for path in files],
        "fine_label": expected.labels.tolist(),
    }
    pyarrow.parquet.write_table(pyarrow.table(cells), tmp_path / "bare.parquet")
    for name in ("set", "hub", "bare.parquet"):
        data = load(tmp_path / name)
        np.testing.assert_array_equal(data.images[:], expected.images[:])
        np.testing.assert_array_equal(data.labels, expected.labels)
        assert data.class_names == (None if name == "bare.parquet" else expected.class_names)
        assert ("files of other splits, left out: test/0.parquet" in data.notes) == (name == "hub")
    for column, words in (("img", "cannot read row 1: there is no image"), ("fine_label", "row 1")):
        table = pyarrow.table(cells | {column: [cells[column][0], None, *cells[column][2:]]})
        pyarrow.parquet.write_table(table, tmp_path / "null.parquet")
        with pytest.raises(FieldError, match=words):
            load(tmp_path / "null.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(FieldError, match="data: cannot read .*bad.parquet"):
        load(tmp_path / "bad.parquet")
