"""Calibration: measured once, kept, read again, refused on a busy machine, and what auto makes of it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from mmeff.kernels import BlockLayout, explain
from mmeff.kernels import calibration as c
from mmeff.kernels.block_sparse import measure
from mmeff.kernels.block_sparse.measure import Measured

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMEFF_CACHE", str(tmp_path))
    monkeypatch.setattr(c, "_loaded", {})
    return tmp_path / "calibration"


def found(monkeypatch, dense=5e10, spread=1.1, **ratios):
    calls = []

    def measured(device, dtype, direction, *, tokens, rounds):
        calls.append((dtype, direction))
        return Measured(dense, ratios, spread)

    monkeypatch.setattr(measure, "measure", measured)
    return calls


def test_a_measurement_is_kept_for_later_processes(cache, monkeypatch):
    calls = found(monkeypatch, native=2.0, gather=0.5, masked=0.8)
    rates = c.calibrate("cpu", torch.float32)
    assert rates.measured and rates.ratios["native"] == 2.0 and len(calls) == 1
    monkeypatch.setattr(c, "_loaded", {})  # another process
    assert c.rates(CPU, torch.float32, "forward", 1e12) == rates and len(calls) == 1
    assert c.sparse_ratio("cpu") == 2.0
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["rates"]["forward float32"]["ratios"]["gather"] == 0.5
    file.write_text("{ cut off")
    monkeypatch.setattr(c, "_loaded", {})
    assert not c.rates(CPU, torch.float32, "forward").measured  # as if it were not there


def test_only_a_problem_that_is_worth_it_starts_a_measurement(cache, monkeypatch):
    calls = found(monkeypatch, native=2.0, masked=0.8)
    monkeypatch.setenv("MMEFF_CALIBRATE", "1")
    assert not c.rates(CPU, torch.float32, "forward", c.WORTH_CALIBRATING / 2).measured
    assert not c.rates(CPU, torch.float64, "forward", 1e12).measured
    assert calls == []
    assert c.rates(CPU, torch.bfloat16, "backward", c.WORTH_CALIBRATING).measured
    assert calls == [(torch.bfloat16, "backward")]
    monkeypatch.setenv("MMEFF_CALIBRATE", "0")
    assert not c.rates(CPU, torch.float32, "forward", 1e12).measured


def test_a_busy_machine_is_not_trusted(cache, monkeypatch, caplog):
    calls = found(monkeypatch, spread=c.NOISY + 0.1, native=0.1, masked=0.1)
    monkeypatch.setenv("MMEFF_CALIBRATE", "1")
    rates = c.rates(CPU, torch.float32, "forward", 1e12)
    assert not rates.measured and rates.ratios["native"] > 1
    assert "too busy to calibrate forward float32" in caplog.text
    assert not list(cache.iterdir()) if cache.exists() else True
    c.rates(CPU, torch.float32, "forward", 1e12)
    assert len(calls) == 1  # not at every call


def test_auto_follows_the_measured_ratios(cache, monkeypatch):
    q = torch.zeros(1, 2048, 2, 16)
    layout = BlockLayout.from_block_mask(torch.eye(32).bool(), q_len=2048, kv_len=2048, q_block=64, kv_block=64)
    monkeypatch.setenv("MMEFF_NATIVE", "0")
    found(monkeypatch, gather=0.5, masked=0.7)
    c.calibrate("cpu", torch.float32)
    assert explain(q, q, q, layout).chosen == "gather"
    found(monkeypatch, gather=0.01, masked=0.7)
    c.calibrate("cpu", torch.float32)
    assert explain(q, q, q, layout).chosen == "sdpa"


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_real_measurement_is_sane(direction):
    result = measure.measure(CPU, torch.float32, direction, tokens=256, rounds=3)
    assert result.dense > 1e8 and result.spread >= 1
    assert {"gather", "masked"} <= set(result.ratios) and all(r > 0 for r in result.ratios.values())
    assert dataclasses.is_dataclass(result)
