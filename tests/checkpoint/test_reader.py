"""Reading a tensor into another: any dtype and layout, piece by piece, and what is said of a file that ends."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from tenp_dist.checkpoint import reader as reader_module
from tenp_dist.checkpoint.index import open_index
from tenp_dist.checkpoint.reader import TensorReader
from tenp_dist.errors import SourceError
from tenp_dist.model.memory import own_copy, own_zeros

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]
SHAPES = {"matrix": (7, 13), "row": (1, 16), "vector": (5,), "scalar": (), "empty": (0, 4)}


@pytest.fixture
def checkpoint(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{dtype}": torch.randn(shape, generator=generator).to(dtype)
        for name, shape in SHAPES.items()
        for dtype in DTYPES
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path, tensors


@pytest.mark.parametrize("piece", [8, 24, 4 << 20])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_into_equals_the_stored_tensor_converted(checkpoint, monkeypatch, piece, target):
    folder, tensors = checkpoint
    monkeypatch.setattr(reader_module, "_PIECE_BYTES", piece)
    with TensorReader(open_index(folder)) as reader:
        for name, stored in tensors.items():
            found = own_zeros(stored.shape, target)
            reader.into(name, found)
            assert torch.equal(found, stored.to(target)), name
        assert reader.read_bytes == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_into_a_part_of_a_wider_tensor(checkpoint, target):
    folder, tensors = checkpoint
    with TensorReader(open_index(folder)) as reader:
        for name, stored in tensors.items():
            if stored.dim() == 2:
                wide = torch.full((stored.shape[0], stored.shape[1] + 3), 9.0, dtype=target)
                reader.into(name, wide[:, : stored.shape[1]])
                assert torch.equal(wide[:, : stored.shape[1]], stored.to(target)), name
                assert bool((wide[:, stored.shape[1] :] == 9).all())


def test_a_file_that_ends_between_pieces_says_how_much_was_there(checkpoint, monkeypatch):
    folder, _ = checkpoint
    monkeypatch.setattr(reader_module, "_PIECE_BYTES", 8)
    with TensorReader(index := open_index(folder)) as reader:
        entry = index.entry(f"matrix.{torch.float16}")
        os.truncate(folder / entry.file, entry.start + 20)
        with pytest.raises(SourceError, match="became shorter") as error:
            reader.into(entry.name, torch.empty(7, 13))
    assert "20 bytes" in str(error.value) and f"{entry.nbytes} bytes" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_of_its_own_shares_nothing(dtype):
    tensor = torch.arange(12.0).to(dtype).view(3, 4).T
    copy = own_copy(tensor)
    assert torch.equal(copy, tensor) and copy.is_contiguous()
    copy.zero_()
    assert tensor[1, 1] == 5
