"""WanHost's dry run against what then runs, and how a host is found."""

from __future__ import annotations

import sys

import pytest
import torch
from diffusers import WanTransformer3DModel
from small_wan import FULL, SPARSE, generate, make_pipe

import mmeff
from mmeff.diffusion_attn import Radial, VMoBA
from mmeff.diffusion_attn.hosts.wan import WanHost
from mmeff.kernels import calibration


def test_the_plan_says_what_the_report_says(monkeypatch):
    pipe = make_pipe()
    method = SPARSE.replace(dense_steps=1, dense_layers=1)
    monkeypatch.setattr(WanTransformer3DModel, "forward", None)  # a plan that runs the model fails
    plan = mmeff.plan(pipe, method, height=48, width=48, num_frames=9, num_inference_steps=3)
    monkeypatch.undo()
    with mmeff.accelerate(pipe, method) as handle:
        generate(pipe, steps=3)
    report = handle.report()
    assert plan.density == pytest.approx(report.density)
    assert plan.layouts["video"].q_len == 180
    rows = dict(plan.rows)
    assert rows["sparse layer calls"] == "4 of 9" and report.calls["sparse"] == 2 * 4
    assert rows["dense steps"] == "1 of 3 (0)" and rows["dense layers"] == "1 of 3 (0)"
    assert plan.fallbacks == () and str(plan) and plan.to_dict()["density"] == plan.density


def test_predictions_follow_the_multiply_adds():
    with torch.device("meta"):
        wan = WanTransformer3DModel(num_layers=2)  # the widths of Wan2.1-14B
    method = Radial(dense_steps=0, dense_layers=0)
    plan = mmeff.plan(wan, method, height=720, width=1280, num_frames=81, num_inference_steps=4)
    N, C, T = 21 * 45 * 80, 5120, 512
    layer = 4 * N * C * C + 2 * N * C * C + 2 * T * C * C + 2 * N * T * C + 2 * N * C * 13824
    attention, outside = 2 * N * N * C, N * C * 4 * 32
    factor = plan.layouts["video"].predicted_speedup()
    expected = (outside + 2 * (layer + attention)) / (outside + 2 * (layer + attention / factor))
    assert factor > 2 and plan.predicted_speedup == pytest.approx(expected)
    half = mmeff.plan(wan, method.replace(dense_layers=1), height=720, width=1280)
    assert 1 < half.predicted_speedup < plan.predicted_speedup


@pytest.mark.parametrize(
    "method", [SPARSE, VMoBA(chunks=((1, 3, 3),), top_k=2, threshold=None, dense_steps=0, dense_layers=0)]
)
def test_predictions_are_those_of_the_device_that_computes(method, monkeypatch):
    pipe, sizes = make_pipe(), {"height": 48, "width": 48, "num_frames": 9, "num_inference_steps": 2}
    at = {}
    monkeypatch.setattr(calibration, "_machine", lambda device_type: f"a {device_type}")
    monkeypatch.setattr(calibration, "_loaded", {"a cpu": {}, "a cuda": at})

    def attention():
        plan = mmeff.plan(pipe, method, **sizes)
        return plan.predicted_attention, dict(plan.rows)

    here, rows = attention()
    assert (
        rows["predicted for"]
        == "this CPU: 1.30 of dense throughput per visited pair, assumed; `mmeff calibrate` measures it"
    )
    # weights that wait on the CPU for a GPU to compute with them
    monkeypatch.setattr(type(pipe), "_execution_device", property(lambda self: torch.device("cuda:0")))
    there, rows = attention()
    assert rows["predicted for"].startswith("this GPU: 0.50 of dense") and "assumed" in rows["predicted for"]
    assert "attention of a layer on this GPU" not in rows
    at["forward bfloat16"] = calibration.Rates(1e14, {"triton": 0.8, "masked": 3.0}, measured=True)
    measured, rows = attention()
    assert rows["predicted for"] == "this GPU: 0.80 of dense throughput per visited pair, measured"
    assert rows["attention of a layer on this GPU"].endswith("in bfloat16")
    assert there < measured < here
    assert method.dynamic or there / measured == pytest.approx(0.5 / 0.8)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"height": 48, "width": 48, "num_frames": 1}, "Radial.block must be <= F*H*W = 1*6*6 = 36"),
        ({"height": 50, "width": 48, "num_frames": 9}, "height=50 is not a multiple of 16 pixels"),
        (
            {"height": 48, "width": 48, "num_frames": 10},
            "num_frames=10 is not 1 + a multiple of 2: the pipeline makes it 11",
        ),
        (
            {"height": 48, "width": 48, "num_frames": 9, "num_inference_steps": 1},
            "the schedule leaves no layer and step",
        ),
    ],
)
def test_a_plan_lists_reasons_instead_of_raising(sizes, reason):
    plan = mmeff.plan(make_pipe(), SPARSE.replace(block=40, dense_steps=1), **{"num_inference_steps": 4, **sizes})
    assert any(reason in text for text in plan.fallbacks), plan.fallbacks


def test_a_plan_of_a_full_layout_promises_nothing():
    plan = mmeff.plan(make_pipe(), FULL, height=48, width=48, num_frames=9, num_inference_steps=2)
    assert plan.density == 1 and plan.predicted_speedup == 1
    assert any("attends to everything" in text for text in plan.fallbacks)


def test_sizes_of_a_plan_are_checked():
    with pytest.raises(TypeError, match="frames"):
        mmeff.plan(make_pipe(), SPARSE, frames=9)
    with pytest.raises(ValueError, match="plan needs num_frames >= 1, got 0"):
        mmeff.plan(make_pipe(), SPARSE, num_frames=0)


def test_looking_for_a_host_does_not_load_diffusers(monkeypatch):
    pipe = make_pipe()
    assert WanHost.matches(pipe) and WanHost.matches(pipe.transformer) and not WanHost.matches(pipe.vae)
    for name in [n for n in sys.modules if n.split(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it raises now
    assert not WanHost.matches(object()) and not WanHost.matches(torch.nn.Linear(1, 1))
