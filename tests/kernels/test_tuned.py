"""Measured tiles come before the tables of the Triton backends, on the architecture, dtype and width that they are for."""

from __future__ import annotations

import re

import pytest
import torch

from mmeff.kernels import tuned
from mmeff.kernels.block_sparse import triton_configs
from mmeff.kernels.block_sparse.triton_configs import Config
from mmeff.kernels.neighborhood import triton_impl as neighborhood
from mmeff.kernels.token_scores import triton_impl as token_scores
from mmeff.kernels.tuned import Tiles

ODD = Tiles(32, 16, 2, 5)  # in no table
KERNELS = ("block_sparse forward", "block_sparse dq", "block_sparse dkdv", "neighborhood forward", "neighborhood backward",
           "token_scores forward", "token_scores backward")  # fmt: skip


def q(D=128, dtype=torch.bfloat16):
    return torch.empty(1, 4, 2, D, dtype=dtype)


def taken(kernel, x, blocks=(128, 128)):
    """What a kernel would run with: the tile sizes, warps and stages."""
    operator, name = kernel.split()
    if operator == "block_sparse":
        config = triton_configs.config(name, x, *blocks)
        return config.rows, config.cols, config.warps, config.stages
    if operator == "neighborhood":
        return tuple(neighborhood.blocks(name, x))
    tiles = token_scores.blocks(name, x, 4096)
    return tiles["BLOCK_R"], tiles["BLOCK_N"], tiles["num_warps"], tiles["num_stages"]


@pytest.fixture
def gpu(monkeypatch):
    """A table of its own, and CPU tensors that count as those of a GPU of capability 9.0."""
    table: dict = {"sm90": {}}
    monkeypatch.setattr(tuned, "TUNED", table)
    monkeypatch.setattr(tuned, "arch_of", lambda device: "sm90")
    return table


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_entry_comes_before_the_table(gpu, kernel):
    before = taken(kernel, q())
    blocks = (128, 128) if kernel.startswith("block_sparse") else None
    gpu["sm90"][tuned.key(kernel, torch.bfloat16, 128, blocks)] = ODD
    assert taken(kernel, q())[:2] == (32, 16) != before[:2]
    assert taken(kernel, q())[3] == 5
    for other in (q(64), q(dtype=torch.float16), q(dtype=torch.float32)):
        assert taken(kernel, other)[3] != 5, "an entry is for one dtype and one head width"


@pytest.mark.parametrize("kernel", KERNELS)
def test_another_architecture_keeps_its_table(gpu, kernel, monkeypatch):
    before = taken(kernel, q())
    blocks = (128, 128) if kernel.startswith("block_sparse") else None
    gpu["sm90"][tuned.key(kernel, torch.bfloat16, 128, blocks)] = ODD
    monkeypatch.setattr(tuned, "arch_of", lambda device: "sm100")
    assert taken(kernel, q()) == before
    monkeypatch.undo()
    assert tuned.arch_of(torch.device("cpu")) is None
    assert taken(kernel, q()) == before, "outside CUDA nothing is tuned"


def test_blocks_and_widths(gpu):
    key = tuned.key("block_sparse forward", torch.bfloat16, 128, (64, 1560))
    assert key == "block_sparse forward bfloat16 D128 blocks 64x128"
    gpu["sm90"][key] = Tiles(64, 128, 4, 2)
    assert triton_configs.config("forward", q(), 64, 2048) == Config(64, 128, 4, 2), "longer blocks are cut into tiles"
    assert triton_configs.config("forward", q(96), 64, 128) == Config(64, 128, 4, 2), "heads are padded to 128 channels"
    assert triton_configs.config("forward", q(), 64, 64) != Config(64, 64, 4, 2), "other blocks keep the table"


def test_what_a_user_tuned_comes_first(gpu, monkeypatch, tmp_path):
    """On a GPU; here its name, capability and cache are made up."""
    gpu["sm90"][tuned.key("block_sparse forward", torch.bfloat16, 128, (128, 128))] = ODD
    monkeypatch.setenv("MMEFF_CACHE", str(tmp_path))
    device = triton_configs._Device("NVIDIA H200", "sm90")
    monkeypatch.setattr(triton_configs._Device, "of", staticmethod(lambda _: device))
    own = Config(64, 64, 4, 1)
    triton_configs._tuned.cache_clear()
    triton_configs._remember(device, {triton_configs._key("forward", torch.bfloat16, 128, 128, 128): own})

    class OnCuda:  # enough of a tensor
        device = torch.device("cuda")
        dtype, shape = torch.bfloat16, (1, 4, 2, 128)

        def element_size(self):
            return 2

    assert triton_configs.config("forward", OnCuda(), 128, 128) == own
    triton_configs._tuned.cache_clear()
    (file,) = (tmp_path / "triton").iterdir()
    file.unlink()
    assert triton_configs.config("forward", OnCuda(), 128, 128) == Config(32, 16, 4, 5)
    triton_configs._tuned.cache_clear()


def test_the_checked_in_entries_are_names_that_kernels_look_up():
    pattern = re.compile(rf"({'|'.join(KERNELS)}) (float16|bfloat16|float32) D(16|32|64|128|256)( blocks \d+x\d+)?")
    for arch, entries in tuned.TUNED.items():
        assert re.fullmatch(r"sm\d+", arch)
        for name, tiles in entries.items():
            found = pattern.fullmatch(name)
            assert found and bool(found[4]) == name.startswith("block_sparse"), name
            assert len(tiles) == 4 and all(n & (n - 1) == 0 for n in tiles[:3]) and tiles[3] >= 1, name
