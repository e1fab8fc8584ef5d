"""Safetensors files that are written piece by piece, and read as flat ranges."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dtune.checkpoint.layout import Digest, hash_file
from dtune.runtime.files import published_folder
from dtune.runtime.tensors import DTYPE_NAMES, FileSource, TensorEntry, TensorWriter

SHAPES = [(), (0,), (7,), (3, 5), (2, 3, 4), (4, 0, 2)]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{dtype}/{shape}": (torch.randn(shape, generator=generator) * 9).to(dtype)
        for dtype, shape in itertools.product(DTYPE_NAMES, SHAPES)
    }


def write(path: Path, values: dict[str, torch.Tensor], *, digest: Digest | None = None) -> None:
    entries = {name: TensorEntry(t.dtype, tuple(t.shape)) for name, t in values.items()}
    with TensorWriter(path, entries, metadata={"format": "pt"}, digest=digest) as writer:
        for name, tensor in values.items():
            writer.write(name, tensor)


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    digest = Digest()
    write(tmp_path / "file", tensors(), digest=digest)
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert digest.hexdigest() == hash_file(tmp_path / "file")


def test_tensors_are_cast_and_may_come_in_any_order_and_layout(tmp_path: Path) -> None:
    a, b = torch.randn(3, 4), torch.randn(5, 2).T
    entries = {"a": TensorEntry(torch.bfloat16, (3, 4)), "b": TensorEntry(torch.float32, (2, 5))}
    with TensorWriter(tmp_path / "file", entries) as writer:
        writer.write("b", b)
        writer.write("a", a)
    loaded = load_file(tmp_path / "file")
    assert torch.equal(loaded["a"], a.bfloat16())
    assert torch.equal(loaded["b"], b)


def test_tensor_that_was_not_written_is_a_bug(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path / "file", {"a": TensorEntry(torch.float32, (1,))})
    with pytest.raises(AssertionError, match="never written"), writer:
        pass


def test_every_range_equals_the_flattened_tensor(tmp_path: Path) -> None:
    stored = {name: tensor.contiguous() for name, tensor in tensors().items()}
    save_file(stored, tmp_path / "file")
    source = FileSource.of_files(tmp_path / "file")
    for name, tensor in stored.items():
        flat = tensor.reshape(-1)
        assert source.shape(name) == tuple(tensor.shape)
        for start, stop in itertools.combinations_with_replacement(range(flat.numel() + 1), 2):
            assert torch.equal(source.read(name, start, stop), flat[start:stop])


def test_folder_that_failed_is_not_seen_and_the_older_one_stays(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (tmp_path / ".tmp-target-dead").mkdir()
    for text in ("old", "new"):
        with published_folder(target) as folder:
            (folder / "file").write_text(text)
            assert not target.exists() or (target / "file").read_text() == "old"
        assert (target / "file").read_text() == text
    with pytest.raises(FileNotFoundError), published_folder(target) as folder:
        (folder / "missing" / "file").write_text("half")
    assert (target / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
