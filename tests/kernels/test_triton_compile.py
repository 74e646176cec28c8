"""The Triton kernels compile for every architecture without one at hand, and fit it; and the table of their configs.

The launcher runs on CPU tensors with the kernels replaced by recorders, so what is compiled is what would be launched.
"""

from __future__ import annotations

import os
import re
import subprocess

import pytest
import torch

pytest.importorskip("triton", reason="triton is optional")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels made for the interpreter cannot be compiled", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmeff.errors import BackendUnavailable
from mmeff.kernels import BlockLayout
from mmeff.kernels.block_sparse import triton_configs, triton_impl, triton_kernels
from mmeff.kernels.block_sparse.problem import BackwardProblem, Problem
from mmeff.kernels.block_sparse.triton_configs import SHARED_MEMORY, TABLE, Config
from mmeff.kernels.layout import Bounds

KERNELS = ("forward", "dq", "dkdv", "delta", "merge", "add_pieces")
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
TYPES[torch.uint8] = "u8"
# Bytes of spilled registers, per thread, that a config of the table may cost: a few values, moved outside the loops.
MAX_STACK = 96


class Recorder:
    """Stands for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        assert len(grid) == 1 and grid[0] > 0
        return lambda **arguments: self.launches.append(arguments)


@pytest.fixture
def recorders(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compile, whatever was compiled before
    made = {name: Recorder(getattr(triton_kernels, name)) for name in KERNELS}
    for name, recorder in made.items():
        monkeypatch.setattr(triton_kernels, name, recorder)
    return made


def compiled(recorder, arch):
    """Compile the kernel's last launch for sm_<arch>, with the specialisations that a launch would find."""
    kernel, arguments = recorder.kernel, recorder.launches[-1]
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        x = arguments[name]
        special = isinstance(x, torch.Tensor) or not kernel.params[i].do_not_specialize
        if kernel.params[i].is_constexpr or (special and isinstance(x, int) and x == 1):
            signature[name], constants[i,] = "constexpr", x
        elif isinstance(x, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if isinstance(x, int) else "*" + TYPES[x.dtype]
            if isinstance(x, torch.Tensor) or (special and x % 16 == 0):
                attributes[i,] = [["tt.divisibility", 16]]
    options = {name: arguments[name] for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in arguments}
    assert set(arguments) == set(kernel.arg_names) | set(options)
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", arch, 32), options=options
    )


def launch(kernel, arch, dtype, D, block=128, group=1, bounds=True, ragged=0):
    """Run the launcher of one kernel with the table's config for an architecture."""
    N = 3 * block - ragged
    q, k = torch.empty(1, N, 2 * group, D, dtype=dtype), torch.empty(1, N, 2, D, dtype=dtype)
    if bounds:
        layout = BlockLayout.from_bounds(Bounds.causal(N, N), q_block=block, kv_block=block)
    else:
        layout = BlockLayout.from_dense_mask(torch.ones(N, N).tril().bool(), q_block=block, kv_block=block)
    config = triton_configs.from_table(kernel, f"sm{arch}", q.element_size(), D, block, block)
    problem = Problem(q, k, k, layout, 0.1, True)
    if kernel == "forward":
        triton_impl.attend(problem, config)
    else:
        lse = torch.zeros(1, 2 * group, N)
        needs = (kernel == "dq", kernel == "dkdv", kernel == "dkdv")
        triton_impl.backward(BackwardProblem(problem, q, lse, q, lse, needs), {kernel: config})


def stack_bytes(binary, tmp_path):
    """Return the bytes of local memory, which spilled registers go to, of a thread."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return sum(int(n) for n in re.search(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups())


@pytest.mark.parametrize(
    ("kernel", "arch", "dtype", "D"),
    [
        ("forward", 80, torch.float16, 128),
        ("forward", 89, torch.bfloat16, 128),
        ("forward", 90, torch.bfloat16, 64),
        ("forward", 100, torch.bfloat16, 128),
        ("forward", 90, torch.float32, 128),
        ("dq", 89, torch.float16, 256),
        ("dkdv", 80, torch.float16, 64),
        ("dkdv", 90, torch.bfloat16, 128),
    ],
    ids=str,
)
def test_default_configs_fit_their_architecture(recorders, tmp_path, kernel, arch, dtype, D):
    launch(kernel, arch, dtype, D, bounds=arch != 89)  # tiles of a bitmap take shared memory, which is scarcest there
    binary = compiled(recorders[kernel], arch)
    assert binary.metadata.shared <= SHARED_MEMORY[f"sm{arch}"]
    assert stack_bytes(binary, tmp_path) <= MAX_STACK


@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        ("forward", {"D": 80, "group": 2, "bounds": False, "ragged": 5}),
        ("dq", {"D": 72, "block": 49, "bounds": False}),
        ("dkdv", {"D": 128, "block": 64, "group": 4, "ragged": 5}),
    ],
)
def test_masks_groups_and_padded_heads_compile(recorders, kernel, case):
    launch(kernel, 90, torch.bfloat16, **case)
    assert compiled(recorders[kernel], 90).metadata.shared <= SHARED_MEMORY["sm90"]


def test_the_kernels_around_them_compile(recorders):
    mask = torch.eye(20, dtype=torch.bool)
    mask[3] = mask[:, 5] = True  # a long row and a long column, which run in pieces
    layout = BlockLayout.from_block_mask(mask, q_len=320, kv_len=320, q_block=16, kv_block=16)
    q = torch.empty(1, 320, 2, 64, dtype=torch.bfloat16)
    lse = torch.zeros(1, 2, 320)
    problem = Problem(q, q, q, layout, 0.1, True)
    triton_impl.attend(problem)
    triton_impl.backward(BackwardProblem(problem, q, lse, q, None, (True, True, True)))
    assert {name: len(recorder.launches) for name, recorder in recorders.items()} == {
        "forward": 1, "merge": 1, "delta": 1, "dq": 1, "dkdv": 1, "add_pieces": 3,
    }  # fmt: skip
    for name in ("merge", "delta", "add_pieces"):
        assert compiled(recorders[name], 90).metadata.shared <= 48 * 1024


def test_keys_and_values_are_three_tiles_ahead(recorders):
    launch("forward", 90, torch.bfloat16, 128)
    text = compiled(recorders["forward"], 90).asm["ttgir"]
    # two loops, each with buffers for keys and for values; a load of the list in the way would leave two stages of them
    assert len(re.findall(r"ttg.local_alloc : \(\) -> !ttg.memdesc<3x64x128xbf16", text)) == 4


# ---------------------------------------------------------------- the table


def test_the_table_is_complete():
    for kernel, archs in TABLE.items():
        assert set(archs) == set(SHARED_MEMORY), kernel
        for arch, widths in archs.items():
            assert set(widths) == {2, 4}
            for itemsize, heads in widths.items():
                assert max(heads) == triton_impl.MAX_D
                for D in (1, 64, 65, 256):
                    assert triton_configs.from_table(kernel, arch, itemsize, D, 128, 128).rows >= 16


@pytest.mark.parametrize(
    ("block", "largest", "tile"),
    [(128, 128, 128), (128, 64, 64), (256, 128, 128), (96, 128, 128), (49, 128, 64), (20, 128, 32), (1, 64, 16)],
)
def test_tiles_cover_blocks_at_the_least_cost(block, largest, tile):
    assert triton_configs.tile(block, largest) == tile


def test_narrow_blocks_take_fewer_warps():
    assert triton_configs.fitted(Config(128, 64, 8, 3), 64, 32) == Config(64, 32, 4, 3)
    assert triton_configs.fitted(Config(128, 64, 8, 3), 1, 1) == Config(16, 16, 4, 3)


def test_every_capability_has_a_row():
    archs = {c: triton_configs.arch_of(c) for c in ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))}
    assert list(archs.values()) == ["sm80", "sm89", "sm80", "sm89", "sm90", "sm100", "sm100", "sm89"]


def test_what_tuning_found_is_kept_and_read_back(monkeypatch, tmp_path):
    monkeypatch.setenv("MMEFF_CACHE", str(tmp_path))
    device = triton_configs._Device("NVIDIA H200", "sm90")
    triton_configs._tuned.cache_clear()
    assert triton_configs._tuned(device) == {}
    key = triton_configs._key("forward", torch.bfloat16, 128, 64, 64)
    triton_configs._remember(device, {key: Config(64, 64, 4, 3)})
    triton_configs._remember(device, {"another": Config(64, 32, 4, 3)})
    assert triton_configs._tuned(device) == {key: Config(64, 64, 4, 3), "another": Config(64, 32, 4, 3)}
    (file,) = (tmp_path / "triton").iterdir()
    file.write_text(file.read_text()[:20])
    triton_configs._tuned.cache_clear()
    assert triton_configs._tuned(device) == {}, "a file that was cut off counts as none"
    triton_configs._tuned.cache_clear()


def one_block(dtype=torch.float32, D=8):
    layout = BlockLayout.from_block_mask(torch.ones(1, 1).bool(), q_len=16, kv_len=16, q_block=16, kv_block=16)
    return Problem(*(torch.zeros(1, 16, 1, D, dtype=dtype) for _ in range(3)), layout, 1.0, False)


def test_cpu_tensors_are_refused_outside_the_interpreter():
    assert triton_impl.why_not(one_block()) == "it needs an NVIDIA GPU, and the tensors are on cpu"
    with pytest.raises(BackendUnavailable, match=r"tune: .* it needs an NVIDIA GPU"):
        triton_configs.tune(one_block())


def test_the_cost_falls_with_the_density_and_with_wider_blocks():
    def cost(density, block):
        n = 4096 // block
        mask = torch.rand(n, n, generator=torch.Generator().manual_seed(0)) < density
        mask.fill_diagonal_(True)
        layout = BlockLayout.from_block_mask(mask, q_len=4096, kv_len=4096, q_block=block, kv_block=block)
        return triton_impl.FORWARD.cost(Problem(*(torch.empty(1, 4096, 8, 64) for _ in range(3)), layout, 1.0, False))

    assert cost(0.1, 128) < cost(0.5, 128) < cost(0.5, 64) < cost(0.5, 16)


@pytest.mark.gpu
def test_tuning_finds_configs_for_this_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("MMEFF_CACHE", str(tmp_path))
    triton_configs._tuned.cache_clear()
    layout = BlockLayout.from_block_mask(torch.ones(8, 8).bool(), q_len=512, kv_len=512, q_block=64, kv_block=64)
    q = torch.randn(1, 512, 2, 64, device="cuda", dtype=torch.bfloat16)
    found = triton_configs.tune(Problem(q, q, q, layout.to("cuda"), 0.1, False, training=True), rounds=2)
    assert {key.split()[0] for key in found} == {"forward", "dq", "dkdv"}
    assert triton_configs.config("forward", q, 64, 64) == next(c for key, c in found.items() if "forward" in key)
    triton_configs._tuned.cache_clear()
