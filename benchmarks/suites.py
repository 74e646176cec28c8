"""Named suites: which cases are run together, on which device.

`quick` answers in minutes whether something broke; `full` holds every figure that the documentation quotes.
"""

from __future__ import annotations

from collections.abc import Iterator

from .cases import BlockSparse, Case, Direction, Merge, MethodLayout, Neighborhood, RandomBlocks, Routed, TokenScores

HUNYUAN = (30, 48, 80)  # HunyuanVideo, 117 frames of 768 x 1280: 115,200 tokens, 24 heads of 128
WAN = (21, 30, 52)  # Wan2.1 1.3B, 81 frames of 480 x 832: 32,760 tokens, 12 heads of 128
CPU_BACKENDS = ("auto", "native", "gather")
GPU_PEERS = ("sdpa", "cudnn", "flash")


def cases(device: str, suite: str) -> list[Case]:
    """Return the cases of a suite, the most telling first: a run that stops early has those.

    Raises: ValueError for a device type or suite that there is not.
    """
    suites = {
        ("cpu", "quick"): _cpu_quick, ("cpu", "full"): _cpu_full, ("cuda", "quick"): _cuda_quick,
        ("cuda", "full"): _cuda_full,
    }  # fmt: skip
    if (device, suite) not in suites:
        known = ", ".join(f"{s} on {d}" for d, s in suites)
        raise ValueError(f"benchmarks: no suite {suite!r} for {device}; there are {known}.")
    return list(suites[device, suite]())


# ---------------------------------------------------------------- CPU


def _cpu_random(
    sparsity: float,
    *,
    block: int = 64,
    dtype: str = "float32",
    direction: Direction = "forward",
    backends: tuple[str, ...] = CPU_BACKENDS,
    peers: tuple[str, ...] = ("sdpa",),
    bar: tuple[str, str, float] | None = None,
) -> BlockSparse:
    return BlockSparse(
        N=4096, H=8, D=64, dtype=dtype, direction=direction, layout=RandomBlocks(block, sparsity), backends=backends,
        peers=peers, bar=bar,
    )  # fmt: skip


def _cpu_bfloat16(sparsity: float) -> BlockSparse:
    # memory and conversions are all that bfloat16 can save where products are float32
    return _cpu_random(
        sparsity, dtype="bfloat16", backends=("native",), peers=("native float32", "sdpa"),
        bar=("native", "native float32", 1.3),
    )  # fmt: skip


def _token_scores(dtype: str = "float32", peers: tuple[str, ...] = ("sdpa",)) -> TokenScores:
    # LLaVA-NeXT with 2880 visual tokens in a Llama-3-like layer
    return TokenScores(N=2880, H=32, Hk=8, D=128, rows=32, dtype=dtype, peers=peers)


def _cpu_quick() -> Iterator[Case]:
    yield _cpu_random(0.75)
    yield _cpu_random(0.75, direction="forward+backward")
    yield _cpu_random(0.0, backends=("auto",))
    yield _cpu_bfloat16(0.75)
    yield _token_scores()
    yield Neighborhood(N=3136, H=2, D=32, grid=(56, 56), window=(7, 7), bias=True)
    yield Routed(N=4096, H=8, D=64, kv_block=256, picks=4)
    yield Merge(N=4096, H=8, D=64)


def _cpu_full() -> Iterator[Case]:
    for sparsity in (0.75, 0.5, 0.9, 0.0):
        yield _cpu_random(sparsity)
    for sparsity in (0.75, 0.5):
        yield _cpu_random(sparsity, direction="forward+backward")
        yield _cpu_bfloat16(sparsity)
    for sparsity in (0.75, 0.5, 0.9, 0.0):
        yield _cpu_random(sparsity, block=128)
    yield _token_scores()
    yield _token_scores("bfloat16")
    # NAT's first stage, DiNAT's dilated one, a windowed transformer, and a small video under GNA
    yield Neighborhood(N=3136, H=2, D=32, grid=(56, 56), window=(7, 7), bias=True)
    yield Neighborhood(N=3136, H=2, D=32, grid=(56, 56), window=(7, 7), bias=True, direction="forward+backward")
    yield Neighborhood(N=3136, H=2, D=32, grid=(56, 56), window=(7, 7), dilation=8)
    yield Neighborhood(N=3136, H=3, D=32, grid=(56, 56), window=(7, 7), stride=7)
    yield Neighborhood(N=4096, H=4, D=64, grid=(64, 64), window=(13, 13))
    yield Neighborhood(N=5760, H=4, D=64, grid=(10, 24, 24), window=(6, 12, 12), stride=(2, 4, 4))
    for picks in (4, 2):
        yield Routed(N=4096, H=8, D=64, kv_block=256, picks=picks)
    yield Routed(N=4096, H=8, D=64, kv_block=256, picks=4, direction="forward+backward")
    yield Merge(N=4096, H=8, D=64)


# ---------------------------------------------------------------- CUDA


def _wan(
    sparsity: float, *, block: int = 128, direction: Direction = "forward", peers: tuple[str, ...] = GPU_PEERS
) -> BlockSparse:
    return BlockSparse(
        N=32760, H=12, D=128, dtype="bfloat16", layout=RandomBlocks(block, sparsity), direction=direction, peers=peers,
        backends=("auto", "triton"),
    )  # fmt: skip


def _hunyuan(method: str, fields: tuple[tuple[str, object], ...], direction: Direction = "forward") -> BlockSparse:
    return BlockSparse(
        N=115200, H=24, D=128, dtype="bfloat16", layout=MethodLayout(method, HUNYUAN, fields), direction=direction,
        backends=("triton",), peers=("cudnn", "sdpa"),
    )  # fmt: skip


RADIAL = (("decay", 0.95), ("sink", False))  # HunyuanVideo's setting in the authors' scripts
GNA = (("window", (18, 24, 24)), ("stride", (16, 8, 8)))  # NATTEN's published sample


def _cuda_quick() -> Iterator[Case]:
    yield _wan(0.75, peers=(*GPU_PEERS, "flex"))
    yield _wan(0.75, direction="forward+backward", peers=("sdpa", "cudnn"))
    yield _wan(0.75, block=64, peers=("sdpa",))
    yield _wan(0.0, peers=("sdpa",))
    yield _token_scores("bfloat16", ("sdpa", "flash"))
    yield Neighborhood(
        N=32760, H=12, D=128, grid=WAN, window=(9, 16, 16), stride=(3, 4, 4), dtype="bfloat16", peers=("sdpa", "cudnn")
    )


def _cuda_full() -> Iterator[Case]:
    for block in (128, 64):
        yield _wan(0.75, block=block, peers=(*GPU_PEERS, "flex"))
        yield _wan(0.75, block=block, direction="forward+backward", peers=("sdpa", "cudnn", "flex"))
    yield _hunyuan("radial", (*RADIAL, ("block", 128)))
    yield _hunyuan("radial", (*RADIAL, ("block", 64)))
    yield _token_scores("bfloat16", ("sdpa", "flash"))
    for sparsity in (0.5, 0.9, 0.0, 0.25):
        for block in (128, 64):
            yield _wan(sparsity, block=block, peers=("sdpa", "cudnn"))
    for sparsity in (0.5, 0.9):
        for block in (128, 64):
            yield _wan(sparsity, block=block, direction="forward+backward", peers=("sdpa", "cudnn"))
    for direction in ("forward", "forward+backward"):
        yield Neighborhood(
            N=32760, H=12, D=128, grid=WAN, window=(9, 16, 16), stride=(3, 4, 4), dtype="bfloat16",
            direction=direction, peers=("sdpa", "cudnn"),
        )  # fmt: skip
    yield Neighborhood(
        N=115200, H=24, D=128, grid=HUNYUAN, window=(18, 24, 24), stride=(16, 8, 8), dtype="bfloat16", peers=("cudnn",)
    )
    yield _hunyuan("gna", GNA)
    yield Routed(N=32760, H=12, D=128, kv_block=1560, picks=5, dtype="bfloat16", peers=("sdpa", "cudnn"))
    yield Merge(N=32760, H=12, D=128, dtype="bfloat16", peers=("sdpa", "cudnn"))
    yield _hunyuan("radial", (*RADIAL, ("block", 128)), "forward+backward")
