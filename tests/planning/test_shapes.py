"""What a plan reads of a model's files, and what it says of damaged ones."""

from __future__ import annotations

import json
import struct

import pytest

from prefloop.planning.shapes import shape_of
from prefloop.records import PrefloopError

CONFIG = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
}  # fmt: skip


def tensors(header: object) -> bytes:
    """A file of tensors with this header and no numbers."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def test_sizes_are_those_of_the_files_headers(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    one = {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}
    (tmp_path / "model.safetensors").write_bytes(tensors({"__metadata__": {}, "w": one}))
    shape = shape_of(tmp_path)
    assert (shape.hidden, shape.num_layers, shape.num_parameters, shape.stored_bytes) == (32, 2, 12, 48)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[1]"),
        ("config.json", json.dumps({**CONFIG, "text_config": "x"}).encode()),
        ("config.json", json.dumps({**CONFIG, "hidden_size": "wide"}).encode()),
        ("model.safetensors", b"abc"),
        ("model.safetensors", tensors([1])),
        ("model.safetensors", tensors({"w": {"shape": [3]}})),
        ("model.safetensors", struct.pack("<Q", (1 << 64) - 1)),
        ("adapter_config.json", b"[1]"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, name, content):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PrefloopError, match=r"cannot be loaded: ") as caught:
        shape_of(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
