"""When a method acts, and how its base turns a layout into an output, on a method made for the purpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmeff.diffusion_attn._base import SparseAttention, timed, timed_by
from mmeff.kernels import BlockLayout
from mmeff.kernels.block_sparse.op import FORWARD
from mmeff.report import Recorder


@dataclass(frozen=True, kw_only=True)
class Diagonal(SparseAttention):
    """Blocks of four tokens attend to themselves."""

    def layout(self, *, grid, text_len=0, q=None, k=None, layer=0):
        self.check_grid(grid, text_len)
        tokens = grid[0] * grid[1] * grid[2] + text_len
        eye = torch.eye(-(-tokens // 4), dtype=torch.bool)
        return BlockLayout.from_block_mask(eye, q_len=tokens, kv_len=tokens, q_block=4, kv_block=4)


def acting(method, num_steps, num_layers):
    return {
        (step, layer)
        for step in range(num_steps)
        for layer in range(num_layers)
        if not method.is_dense(step=step, num_steps=num_steps, layer=layer, num_layers=num_layers)
    }


def test_first_and_last_steps_and_layers():
    method = Diagonal(dense_steps=2, last_dense_steps=1, dense_layers=1)
    assert acting(method, 5, 3) == {(2, 1), (2, 2), (3, 1), (3, 2)}


def test_listed_layers_count_from_the_end_too():
    method = Diagonal(dense_layers=(0, -1))
    assert method.dense_layer_ids(4) == {0, 3}
    assert acting(method, 1, 4) == {(0, 1), (0, 2)}


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 6), st.integers(1, 8), st.integers(1, 6))
def test_the_number_of_calls_left(first, last, layers, num_steps, num_layers):
    method = Diagonal(dense_steps=first, last_dense_steps=last, dense_layers=layers)
    expected = max(num_steps - first - last, 0) * max(num_layers - layers, 0)
    assert len(acting(method, num_steps, num_layers)) == expected


def test_default_schedule_is_always_sparse_and_needs_no_step():
    method = Diagonal()
    assert not method.counts_steps
    assert not method.is_dense(step=None, num_steps=None, layer=0, num_layers=1)


def test_a_schedule_of_steps_needs_the_step():
    with pytest.raises(ValueError, match=r"keeps 2 first and 0 last steps dense.*got step=None, num_steps=None"):
        Diagonal(dense_steps=2).is_dense(step=None, num_steps=None, layer=0, num_layers=1)


@pytest.mark.parametrize("layers", [(4,), (-5,), (0, 7)])
def test_layers_that_the_model_does_not_have(layers):
    with pytest.raises(ValueError, match=r"Diagonal\.dense_layers must list layers in \[-4, 3\] .* 4 layers, got -?\d"):
        Diagonal(dense_layers=layers).dense_layer_ids(4)
    assert Diagonal(dense_layers=9).dense_layer_ids(4) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"dense_steps": -1}, ValueError, r"Diagonal\.dense_steps must be >= 0 steps, got -1"),
        ({"last_dense_steps": -2}, ValueError, r"Diagonal\.last_dense_steps must be >= 0 steps, got -2"),
        ({"dense_layers": -1}, ValueError, r"must be >= 0 layers, got -1; pass a list such as \(-1,\)"),
        ({"dense_layers": (0, 1.5)}, TypeError, r"Diagonal\.dense_layers must be int or tuple of int"),
        ({"backend": "cuda"}, TypeError, r"Diagonal\.backend must be one of 'auto'"),
    ],
)
def test_fields_are_checked(fields, error, message):
    with pytest.raises(error, match=message):
        Diagonal(**fields)


@pytest.mark.parametrize("backend", [b.name for b in FORWARD])
def test_every_kernel_backend_can_be_named(backend):
    assert Diagonal(backend=backend).backend == backend


# ---------------------------------------------------------------------------- attend


def qkv(tokens, batch=2, heads=3, channels=8):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(batch, tokens, heads, channels, generator=draw) for _ in range(3)]


@pytest.mark.parametrize("text", [0, 3])
def test_attend_is_masked_attention(text):
    q, k, v = qkv(2 * 3 * 3 + text)
    method = Diagonal()
    out = method.attend(q, k, v, grid=(2, 3, 3), text_len=text)
    mask = method.layout(grid=(2, 3, 3), text_len=text).to_dense_mask()
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    assert out.dtype == q.dtype and out.shape == q.shape


def test_attend_uses_the_layout_it_is_given():
    q, k, v = qkv(18)
    full = BlockLayout.from_block_mask(torch.ones(5, 5, dtype=torch.bool), q_len=18, kv_len=18, q_block=4, kv_block=4)
    out = Diagonal().attend(q, k, v, grid=(2, 3, 3), layout=full)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


def test_tokens_must_be_those_of_the_grid():
    q, k, v = qkv(20)
    with pytest.raises(
        ValueError, match=r"q must be \(B, N, H, D\) with N = .* 2\*3\*3 \+ 1 = 19, got shape \(2, 20, 3, 8\)"
    ):
        Diagonal().attend(q, k, v, grid=(2, 3, 3), text_len=1)
    q19, k19, _ = qkv(19)
    with pytest.raises(ValueError, match=r"v must be \(B, N, H, D\)"):
        Diagonal().attend(q19, k19, v, grid=(2, 3, 3), text_len=1)


@pytest.mark.parametrize(
    ("grid", "text", "error"),
    [((2, 3), 0, TypeError), ((2, 3, 3.0), 0, TypeError), ((0, 3, 3), 0, ValueError), ((2, 3, 3), -1, ValueError)],
)
def test_grids_are_checked(grid, text, error):
    with pytest.raises(error, match="Diagonal needs"):
        Diagonal().layout(grid=grid, text_len=text)


def test_time_of_building_a_layout_is_recorded_inside_a_host_only():
    recorder = Recorder()
    q, k, v = qkv(18)
    Diagonal().attend(q, k, v, grid=(2, 3, 3))
    assert recorder.seconds() == {}
    with timed_by(recorder):
        Diagonal().attend(q, k, v, grid=(2, 3, 3))
    assert set(recorder.seconds()) == {"layout"}
    with timed("layout", q.device):
        pass
    assert recorder.spans() == {"layout": 1}


def test_a_method_must_say_where_to_attend():
    @dataclass(frozen=True, kw_only=True)
    class Nowhere(SparseAttention):
        """Nothing."""

        dynamic: ClassVar[bool] = True

    with pytest.raises(TypeError, match="abstract"):
        Nowhere()
