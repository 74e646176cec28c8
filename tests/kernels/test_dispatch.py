"""How block_sparse_attention chooses, records and explains its backend, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from mmeff.errors import BackendUnavailable
from mmeff.kernels import BlockLayout, block_sparse_attention, explain, record
from mmeff.kernels.block_sparse import sdpa


def tensors(B, Nq, Nk, H, Hk, D):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g) for s in ((B, Nq, H, D), (B, Nk, Hk, D), (B, Nk, Hk, D))]


def diagonal(N, block=64, **changes):
    n = -(-N // block)
    return BlockLayout.from_block_mask(torch.eye(n).bool(), q_len=N, kv_len=N, q_block=block, kv_block=block, **changes)


def full(N, block=64):
    n = -(-N // block)
    return BlockLayout.from_block_mask(torch.ones(n, n).bool(), q_len=N, kv_len=N, q_block=block, kv_block=block)


@pytest.fixture
def without_native(monkeypatch):
    """A machine without a C compiler: what auto then takes."""
    monkeypatch.setenv("MMEFF_NATIVE", "0")


def test_auto_records_its_choice(without_native):
    q, k, v = tensors(1, 1024, 1024, 2, 2, 16)
    with record() as calls:
        block_sparse_attention(q, k, v, diagonal(1024))
        block_sparse_attention(q, k, v, full(1024))
        block_sparse_attention(q, k, v, full(1024), return_lse=True)
        block_sparse_attention(q, k, v, diagonal(1024), backend="reference")
    assert [c.operator for c in calls] == ["block_sparse_attention"] * 4
    assert [c.backend for c in calls] == ["gather", "sdpa", "sdpa", "reference"]
    assert [c.density for c in calls] == [1 / 16, 1, 1, 1 / 16]
    assert calls[0].reason.startswith("auto: computes the visited blocks only, in PyTorch; predicted ")
    assert calls[1].reason.startswith("auto: dense attention")
    assert calls[3].reason == "named by the caller"


def test_auto_takes_the_compiled_kernel_where_there_is_one():
    q, k, v = tensors(1, 1024, 1024, 2, 2, 16)
    layout = diagonal(1024)
    with record() as calls:
        block_sparse_attention(q, k, v, layout)
    usable = next(row for row in explain(q, k, v, layout).rows if row.backend == "native").usable
    assert calls[0].backend == ("native" if usable else "gather")


def test_the_density_of_a_call_is_counted_when_it_is_read():
    q, k, v = tensors(1, 64, 64, 2, 2, 16)
    layout = diagonal(64, block=16)
    with record() as calls:
        block_sparse_attention(q, k, v, layout, backend="gather")
    assert "_counted" not in vars(layout)
    assert calls[0].density == 0.25 and "_counted" in vars(layout)


def test_auto_runs_dense_under_the_mask_where_gathering_does_not_pay(without_native):
    q, k, v = tensors(1, 64, 64, 2, 2, 16)
    layout = diagonal(64, block=16)
    with record() as calls:
        out = block_sparse_attention(q, k, v, layout)
    assert calls[0].backend == "sdpa" and calls[0].density == 0.25
    torch.testing.assert_close(out, block_sparse_attention(q, k, v, layout, backend="reference"))


def test_recorders_nest_and_belong_to_their_thread():
    q, k, v = tensors(1, 16, 16, 1, 1, 8)
    layout = diagonal(16, 8)
    with record() as outer:
        block_sparse_attention(q, k, v, layout)
        with record() as inner:
            block_sparse_attention(q, k, v, layout)
        other = threading.Thread(target=block_sparse_attention, args=(q, k, v, layout))
        other.start()
        other.join()
    block_sparse_attention(q, k, v, layout)
    assert (len(outer), len(inner)) == (2, 1)


def test_explain_tabulates_every_backend_and_agrees_with_auto(without_native):
    q, k, v = tensors(1, 1024, 1024, 2, 2, 16)
    for layout in (diagonal(1024), full(1024)):
        for return_lse in (False, True):
            table = explain(q, k, v, layout, return_lse=return_lse)
            with record() as calls:
                block_sparse_attention(q, k, v, layout, return_lse=return_lse)
            assert table.chosen == calls[0].backend
            assert [row.backend for row in table.rows] == ["triton", "native", "gather", "sdpa", "reference"]
            assert sum(row.chosen for row in table.rows) == 1
    text = str(explain(q, k, v, diagonal(1024), return_lse=True))
    assert "q (1, 1024, 2, 16)" in text and "density 0.0625" in text
    assert "native     no            native kernels are switched off by MMEFF_NATIVE=0" in text
    assert "gather     yes     <-    computes the visited blocks only, in PyTorch; predicted" in text


def test_a_named_backend_never_falls_back(monkeypatch):
    q, k, v = tensors(1, 64, 64, 2, 2, 16)
    monkeypatch.setenv("MMEFF_NATIVE", "0")
    with pytest.raises(BackendUnavailable, match=r"'native' cannot run this problem: .*MMEFF_NATIVE=0.*backend='auto'"):
        block_sparse_attention(q, k, v, full(64), backend="native")
    mask = torch.eye(4).bool()
    mask[1] = False
    empty = BlockLayout.from_block_mask(mask, q_len=64, kv_len=64, q_block=16, kv_block=16, allow_empty_rows=True)
    with pytest.raises(BackendUnavailable, match="empty rows"):
        block_sparse_attention(q, k, v, empty, backend="sdpa")
    monkeypatch.setattr(sdpa, "MAX_MASK_ELEMENTS", 64 * 64 - 1)
    with pytest.raises(BackendUnavailable, match=r"1 x 1 x 64 x 64 = 4,096 elements, more than the limit of 4,095"):
        block_sparse_attention(q, k, v, diagonal(64, 16), backend="sdpa")
    block_sparse_attention(q, k, v, full(64), backend="sdpa")  # no mask, no limit
    with record() as calls:
        block_sparse_attention(q, k, v, diagonal(64, 16))
    assert calls[0].backend == "gather"


def test_unknown_backends_get_near_matches():
    q, k, v = tensors(1, 16, 16, 1, 1, 8)
    with pytest.raises(ValueError, match=r"'auto' or one of .*'gather', 'sdpa', 'reference', got 'gathr'.*'gather'"):
        block_sparse_attention(q, k, v, diagonal(16, 8), backend="gathr")


def test_importing_the_kernels_loads_no_triton_and_no_cuda():
    code = (
        "import sys, mmeff.kernels, torch; "
        "assert not torch.cuda.is_initialized(); "
        "assert not [m for m in ('triton', 'diffusers', 'transformers') if m in sys.modules]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layout": torch.ones(4, 4)}, TypeError, "layout must be a BlockLayout, got Tensor; build one with"),
        ({"q": torch.ones(1, 64, 4, 8).long()}, TypeError, "q must be a floating-point tensor, got torch.int64"),
        ({"k": None}, TypeError, "k must be a floating-point tensor, got NoneType"),
        ({"q": torch.ones(64, 4, 8)}, ValueError, r"q must be \(B, N, H, D\).*\(64, 4, 8\)"),
        ({"k": torch.ones(2, 64, 2, 8).half()}, ValueError, "share dtype and device.*k torch.float16"),
        ({"v": torch.ones(2, 64, 2, 4)}, ValueError, r"k and v must have the same shape.*\(2, 64, 2, 4\)"),
        ({"q": torch.ones(1, 64, 4, 8)}, ValueError, r"batch and head width, got q \(B=1, D=8\) and k \(B=2"),
        ({"q": torch.ones(2, 64, 3, 8)}, ValueError, "multiple of the key/value heads, got H=3 and Hk=2"),
        ({"q": torch.ones(2, 65, 4, 8)}, ValueError, "q_len=64, kv_len=64, but q has Nq=65 and k has Nk=64"),
        ({"scale": float("nan")}, ValueError, "scale must be a finite Python float, got nan"),
        ({"scale": torch.ones(())}, ValueError, "scale must be a finite Python float, got tensor"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {
        "q": torch.ones(2, 64, 4, 8),
        "k": torch.ones(2, 64, 2, 8),
        "v": torch.ones(2, 64, 2, 8),
        "layout": diagonal(64, 16),
        **change,
    }
    with pytest.raises(error, match=message):
        block_sparse_attention(**arguments)


def test_layouts_for_another_batch_head_count_or_device_are_refused():
    q, k, v = tensors(2, 64, 64, 4, 2, 8)
    for lead in ((3, 1), (1, 2)):
        mask = torch.ones(*lead, 4, 4, dtype=torch.bool)
        layout = BlockLayout.from_block_mask(mask, q_len=64, kv_len=64, q_block=16, kv_block=16)
        with pytest.raises(ValueError, match=rf"batch must be 1 or B=2 .* got B={lead[0]}, H={lead[1]}"):
            block_sparse_attention(q, k, v, layout)
    with pytest.raises(ValueError, match=r"layout on meta and q on cpu; pass layout.to\('cpu'\)"):
        block_sparse_attention(q, k, v, diagonal(64, 16).to("meta"))
