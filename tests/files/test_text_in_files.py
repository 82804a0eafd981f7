"""Text that no file may hold, and files that hold it anyway."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("safetensors")

from anyarray_linear import SGD, CheckpointError, Linear, load_model, save_checkpoint, save_model
from anyarray_linear.files.models import read_metadata


@pytest.mark.parametrize("metadata", [{"classes": ["a", "caf\udce9"]}, {"caf\udce9": 1}, {"a": {"b": ["\ud83d"]}}])
def test_halves_of_characters_are_not_saved(tmp_path, metadata):
    model = Linear(2, 3, dtype="float32")
    with pytest.raises(TypeError, match="halves of characters; write them out with"):
        save_model(model, tmp_path / "m", metadata=metadata)
    with pytest.raises(TypeError, match="halves of characters"):
        save_checkpoint(tmp_path, model, SGD(0.1), state=metadata)


def test_characters_of_two_halves_are_text(tmp_path):
    save_model(Linear(2, 3), tmp_path / "m", metadata={"classes": ["\U0001f600", "é", "東京"]})
    assert read_metadata(tmp_path / "m") == {"classes": ["\U0001f600", "é", "東京"]}


def test_halves_of_characters_in_a_file_are_refused(tmp_path):
    """With the right checksum: `predict` failed when it wrote the names of the classes."""
    from safetensors.numpy import load, save

    from anyarray_linear.files import sealed

    save_model(Linear(2, 1, dtype="float32"), tmp_path / "m", metadata={"classes": ["x"]})
    data = (tmp_path / "m").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    info = json.loads(header["__metadata__"]["anyarray_linear"])
    del info["sha256"]
    info["metadata"]["classes"] = ["caf\udce9"]
    info["sha256"] = sealed._digest(info, load(data))
    (tmp_path / "m").write_bytes(save(load(data), metadata={"anyarray_linear": json.dumps(info)}))
    for read in (load_model, read_metadata):
        with pytest.raises(CheckpointError, match="halves of characters"):
            read(tmp_path / "m")


@pytest.mark.parametrize("tail", [b"", b"\0" * 500_000])
def test_an_archive_in_place_of_a_model_is_refused_without_its_list_being_read(tmp_path, tail):
    np.savez(tmp_path / "m.npz", X=np.zeros(3))
    (tmp_path / "m").write_bytes((tmp_path / "m.npz").read_bytes() + tail)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load_model(tmp_path / "m")
