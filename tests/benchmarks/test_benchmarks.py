"""The benchmarks at tiny sizes: a gate that rejects what is wrong, rows that say everything, resuming, figures, the CLI."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import __main__ as cli
from benchmarks import peers, plots, results, runner, suites, timing, workloads
from benchmarks.cases import (
    BlockSparse,
    Case,
    Merge,
    MethodLayout,
    Neighborhood,
    RandomBlocks,
    Routed,
    TokenScores,
    Unavailable,
)
from benchmarks.gate import Gate, GateFailed
from benchmarks.results import Machine, Row
from benchmarks.workloads import Contender
from mmeff.kernels import BlockLayout, Bounds
from mmeff.kernels.neighborhood.checks import check_rule
from mmeff.registry import build

CPU = torch.device("cpu")
SMALL = {"N": 150, "H": 4, "Hk": 2, "D": 16}


def small(**fields) -> BlockSparse:
    return BlockSparse(**{**SMALL, "layout": RandomBlocks(16, 0.5), **fields})


CASES: list[Case] = [
    small(backends=("auto", "gather", "sdpa", "reference")),
    small(backends=("gather",), direction="forward+backward"),
    small(backends=("gather",), direction="backward", dtype="bfloat16"),
    small(backends=("gather",), dtype="bfloat16", peers=("gather float32",)),
    small(layout=MethodLayout("radial", (6, 5, 5), (("block", 10),)), Hk=None),
    Neighborhood(**SMALL, grid=(6, 5, 5), window=(3, 2, 5), stride=(1, 2, 3), backends=("auto", "reference")),
    Neighborhood(**SMALL, grid=(15, 10), window=(3, 5), dilation=(4, 2), bias=True, direction="forward+backward"),
    Neighborhood(**SMALL, grid=(150,), window=(9,), causal=True, bias=True),
    Routed(**SMALL, kv_block=16, picks=3, direction="forward+backward", backends=("grouped", "sdpa")),
    TokenScores(**SMALL, rows=5, dtype="bfloat16"),
    Merge(**SMALL, parts=3),
]


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine.here(CPU, commit="c0ffee")


@pytest.fixture
def run(tmp_path, machine):
    """Runs cases quickly into a file of this test, or another one."""

    def call(*cases: Case, out: Path | None = None, **options) -> runner.Outcome:
        given = runner.Options(out=out or tmp_path / "rows.jsonl", pair_seconds=1e-3, **options)
        return runner.run(list(cases), machine, given, lambda what, done, total: None)

    return call


def rows_of(path: Path) -> list[Row]:
    return results.read(path)


# --- the gate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_gate_lets_every_backend_pass(case):
    work = workloads.build(case, CPU)
    gate = Gate(work)
    for backend in case.backends:
        errors = gate.check(work.ours(backend), backend)
        assert set(errors) >= ({"out", "dq", "dk", "dv"} if case.direction != "forward" else {"out"})
        assert all(0 <= error <= allowed < 0.1 for error, allowed in errors.values())


class _Spoiled(torch.autograd.Function):
    """Multiplies on the way there, or on the way back."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return x * there

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.back, None, None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("there", "back", "wrong"),
    [
        (1.02, 1.0, "out: error"),
        (1.0, 1.02, "dq: error"),
        (float("nan"), 1.0, "out: error inf"),
        (1.0, 0.0, "dv: error"),
    ],
)
def test_the_gate_rejects_a_perturbed_backend(dtype, there, back, wrong):
    work = workloads.build(small(direction="forward+backward", dtype=dtype), CPU)
    ours = work.ours("gather")
    spoiled = Contender(lambda: _Spoiled.apply(ours.forward(), there, back), ours.leaves)
    with pytest.raises(GateFailed, match="red gate: backend 'gather' is wrong in block_sparse_attention") as failed:
        Gate(work).check(spoiled, "backend 'gather'")
    assert wrong in str(failed.value)


def test_the_gate_rejects_one_block_too_many():
    work = workloads.build(small(), CPU)
    mask = work.layout.block_mask()
    mask[0, 0, -1, mask[0, 0, -1].logical_not().nonzero()[0]] = True
    work.layout = BlockLayout.from_block_mask(mask, q_len=150, kv_len=150, q_block=16, kv_block=16)
    wrong = work.ours("reference")
    with pytest.raises(GateFailed):
        Gate(workloads.build(small(), CPU)).check(wrong, "reference")


@dataclasses.dataclass(frozen=True)
class Odd:
    """Layouts with partial blocks, and with padding inside the sequence."""

    kind: str

    def build(self, *, N: int, H: int, device: torch.device) -> BlockLayout:
        g = torch.Generator().manual_seed(1)
        if self.kind == "bitmap":
            mask = torch.rand(1, H, N, N, generator=g) < 0.2
            mask |= torch.eye(N, dtype=torch.bool)
            return BlockLayout.from_dense_mask(mask, q_block=16, kv_block=32)
        if self.kind == "bounds":
            positions = torch.arange(N, dtype=torch.int32)
            window = torch.stack([positions - 20, positions]).clamp(min=0)[None]
            bounds = Bounds(window, torch.stack([positions, positions])[None])
            return BlockLayout.from_bounds(bounds, q_block=16, kv_block=16)
        visited = torch.ones(1, 1, -(-N // 16), -(-N // 16), dtype=torch.bool)
        kv_valid = torch.full((visited.shape[3],), 9)
        kv_valid[-1] = 3
        return BlockLayout.from_block_mask(visited, q_len=N, kv_len=N, q_block=16, kv_block=16, kv_valid=kv_valid)


@pytest.mark.parametrize("kind", ["bitmap", "bounds", "padding"])
def test_the_gate_knows_what_a_query_sees(kind):
    work = workloads.build(small(layout=Odd(kind)), CPU)
    expected = work.layout.to_dense_mask()[:, :, work.rows]
    assert torch.equal(work.visible(), expected)
    assert 0 < expected.float().mean() < 1
    Gate(work).check(work.ours("reference"), "reference")


def test_a_peer_that_computes_something_else_is_not_timed(run, monkeypatch):
    monkeypatch.setattr(peers, "flex", lambda q, k, v, layout, direction: lambda: q * 2)
    (row,) = run(small(peers=("flex",)), flex=True).rows
    assert row.status == "skipped"
    assert "flex computes something else here" in row.reason


# --- timing ------------------------------------------------------------------------------------------------------------


def test_sides_alternate_and_ratios_are_paired(monkeypatch):
    ours, peer = (lambda: None), (lambda: None)
    order: list[str] = []
    times = {"ours": iter([9, *[1.0, 2.0, 4.0, 1.0, 1.0]]), "peer": iter([9, *[2.0, 4.0, 8.0, 2.0, 3.0]])}

    def seconds(run, repeats, device):
        order.append("ours" if run is ours else "peer")
        return next(times[order[-1]])

    monkeypatch.setattr(timing, "_seconds", seconds)
    found = timing.compare(ours, peer, CPU, seconds=0, graphs=True)
    assert order[2:] == ["ours", "peer", "peer", "ours"] * 2 + ["ours", "peer"]
    assert found.rounds == 5
    assert found.ratio.p50 == 2  # of the pairs; the medians' own ratio is 3
    assert (found.ours.p50, found.peer.p50) == (1, 3)
    assert found.clock == "perf_counter"


def test_peak_memory_sees_a_buffer():
    needed = timing._peak_memory(lambda: torch.ones(4_000_000).sum(), CPU)
    if needed is None:
        pytest.skip("the resident set's peak cannot be reset here")
    assert 12e6 < needed < 40e6


# --- rows and resuming -------------------------------------------------------------------------------------------------


def test_rows_say_everything(run, tmp_path, machine):
    outcome = run(small(backends=("auto", "gather"), bar=("gather", "sdpa", 1000.0)))
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(lines) == len(outcome.rows) == 2
    assert set(json.loads(lines[0])) == {f.name for f in dataclasses.fields(Row)}
    assert rows_of(tmp_path / "rows.jsonl") == outcome.rows
    auto, gather = outcome.rows
    for row in outcome.rows:
        assert row.status == "measured" and row.reason is None
        assert row.shape == {"B": 1, "N": 150, "H": 4, "Hk": 2, "D": 16}
        assert (row.dtype, row.direction, row.block) == ("float32", "forward", 16)
        assert 0 < row.density < row.block_density + 0.05 < 1
        for spread in (row.ours, row.theirs, row.ratio):
            assert 0 < spread["p20"] <= spread["p50"] <= spread["p80"]
        assert row.rounds >= timing.LEAST_ROUNDS
        assert {"torch", "mmeff", "transformers", "cpu", "threads"} <= set(row.environment)
        assert row.hardware == machine.hardware and "thread" in row.hardware
        assert row.commit == "c0ffee" and row.date[:2] == "20"
        assert row.errors["out"][0] <= row.errors["out"][1]
    assert auto.ran in ("native", "gather", "sdpa") and gather.ran == "gather"
    assert gather.bar_missed and not auto.bar_missed


def test_a_second_run_skips_what_is_there(run, tmp_path):
    case, other = small(backends=("gather", "no-such")), small(backends=("gather",), dtype="bfloat16")
    first = run(case)
    assert [r.status for r in first.rows] == ["measured", "skipped"]
    assert first.rows[1].reason.startswith("block_sparse_attention has no backend 'no-such' in this version; it has")
    second = run(case, other)
    assert (second.done_before, second.left) == (1, 0)
    assert [(r.dtype, r.status) for r in second.rows] == [("float32", "skipped"), ("bfloat16", "measured")]
    assert len(rows_of(tmp_path / "rows.jsonl")) == 3  # the same reason is written once
    assert len(run(case, again=True).rows) == 2
    assert len(rows_of(tmp_path / "rows.jsonl")) == 4


def test_a_row_of_another_machine_does_not_count(run, tmp_path):
    (row,) = run(small(backends=("gather",))).rows
    results.append(tmp_path / "other.jsonl", dataclasses.replace(row, hardware="another machine"))
    assert run(small(backends=("gather",)), out=tmp_path / "other.jsonl").done_before == 0


def test_the_latest_measured_row_wins(run):
    (row,) = run(small(backends=("gather",))).rows
    newer = dataclasses.replace(row, rounds=99)
    failed = dataclasses.replace(row, status="skipped", reason="out of memory")
    assert results.latest([failed, row, newer, failed]) == [newer]


def test_no_pair_starts_when_the_time_is_up(run):
    case = small(backends=("gather", "sdpa"))
    cut = run(case, CASES[-1], seconds=1e-9)
    assert (len(cut.rows), cut.left) == (0, 3)
    rest = run(case, CASES[-1])
    assert (len(rest.rows), rest.done_before, rest.left) == (3, 0, 0)


def test_what_cannot_be_built_is_skipped_with_its_reason(run):
    (row,) = run(small(layout=MethodLayout("no-such-method", (6, 5, 5)))).rows
    assert (row.status, row.ours) == ("skipped", None)
    assert "no method is called 'no-such-method'" in row.reason


def test_peers_that_cannot_run_are_skipped_with_their_reason(run):
    rows = run(small(backends=("gather",), peers=("sdpa", "cudnn", "flex", "no-such float32"))).rows
    assert [r.peer for r in rows] == ["sdpa", "cudnn", "no-such float32"]  # flex was not asked for
    assert "is for CUDA" in rows[1].reason
    assert "no backend 'no-such'" in rows[2].reason


def test_a_red_gate_stops_the_run_and_keeps_what_was_measured(run, tmp_path, monkeypatch):
    ours = workloads.MergeWork._ours
    monkeypatch.setattr(
        workloads.MergeWork, "_ours", lambda self, backend: Contender(lambda: ours(self, backend).forward() + 0.1)
    )
    with pytest.raises(GateFailed, match="Nothing more is timed"):
        run(small(backends=("gather",)), Merge(**SMALL), small(backends=("sdpa",)))
    assert [r.backend for r in rows_of(tmp_path / "rows.jsonl")] == ["gather"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(dtype="int8"), "BlockSparse.dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (lambda: small(direction="sideways"), "got 'sideways'"),
        (lambda: Merge(**SMALL, direction="backward"), "Merge is timed forward only"),
        (lambda: Neighborhood(**SMALL, grid=(10, 10), window=(3, 3)), "has 100 tokens, got N=150"),
        (lambda: RandomBlocks(16, 1.0), "sparsity must be in [0, 1), got 1.0"),
    ],
)
def test_impossible_cases_say_why(make, message):
    with pytest.raises(ValueError) as failed:
        make()
    assert message in str(failed.value)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", ["quick", "full"])
def test_names_tell_the_cases_of_a_suite_apart(device, suite):
    cases = suites.cases(device, suite)
    assert len({c.name for c in cases}) == len(cases) >= 6
    known = {*peers.DENSE, *peers.SPARSE, "native float32"}
    assert all(set(c.peers) <= known for c in cases)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_windows_and_methods_of_a_suite_exist(device):
    for case in suites.cases(device, "full"):
        if isinstance(case, Neighborhood):
            check_rule(case.operator, case.grid, case.window, case.stride, case.dilation, case.causal)
        elif isinstance(case, BlockSparse) and isinstance(case.layout, MethodLayout):
            recipe = case.layout
            method = build(recipe.method, **dict(recipe.fields))
            method.check_grid(recipe.grid, recipe.text_len)
            assert math.prod(recipe.grid) + recipe.text_len == case.N


# --- figures -----------------------------------------------------------------------------------------------------------


def test_figures_are_written(run, tmp_path):
    rows = run(
        *(small(layout=RandomBlocks(16, s), backends=("auto", "gather")) for s in (0.0, 0.5, 0.8)),
        TokenScores(**SMALL, rows=3),
    ).rows
    written = plots.draw(rows, tmp_path / "figures", "cpu")
    assert [p.name for p in written] == ["cpu-sdpa-forward.png", "cpu-operators.png"]
    for path in written:
        with Image.open(path) as image:
            assert min(image.size) > 200
            assert len(image.convert("L").getcolors()) > 20, "the figure is blank"


def test_figures_need_a_measured_row(run, tmp_path):
    rows = run(small(backends=("no-such",))).rows
    with pytest.raises(ValueError, match="holds no measured row"):
        plots.draw(rows, tmp_path, "x")


# --- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(capsys, monkeypatch):
    """Runs `python -m benchmarks ARGS` in this process: (exit code, stdout, stderr on one line)."""

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *args])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, " ".join(err.split())

    return call


@pytest.fixture
def tiny_suite(monkeypatch):
    cases = [small(backends=("gather", "no-such")), Merge(**SMALL)]
    monkeypatch.setattr(suites, "cases", lambda device, suite: cases)


def test_kernels_then_table_then_plot(bench, tiny_suite, tmp_path):
    out = str(tmp_path / "new" / "cpu.jsonl")
    code, text, err = bench("kernels", "--out", out, "--pair-seconds", "0.001")
    assert code == 0
    assert "gather" in text and "skipped" in text
    assert "thread" in err and "cpu.jsonl" in err
    code, text, _ = bench("kernels", "--out", out, "--only", "merge")
    assert (code, "pairs that were measured before: 1;" in text) == (0, True)
    code, text, _ = bench("table", out, "--markdown")
    lines = text.splitlines()
    assert (code, len(lines)) == (0, 5)
    assert {line.count("|") for line in lines} == {len(cli.COLUMNS) + 1}
    code, text, _ = bench("plot", out)
    assert code == 0
    assert all(Path(path).exists() for path in text.split())


def test_dry_run_lists_and_writes_nothing(bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text, _ = bench("kernels", "--device", "cuda", "--suite", "full", "--dry-run", "--out", "x.jsonl")
    assert code == 0
    assert len(text.splitlines()) == len(suites.cases("cuda", "full"))
    assert not list(tmp_path.iterdir())


def test_a_red_gate_has_an_exit_code_of_its_own(bench, tiny_suite, tmp_path, monkeypatch):
    monkeypatch.setattr(workloads.MergeWork, "_ours", lambda self, backend: Contender(lambda: self.outputs[0]))
    code, _, err = bench("kernels", "--out", str(tmp_path / "x.jsonl"), "--only", "merge")
    assert code == cli.RED_GATE
    assert "red gate: backend 'auto' is wrong in merge_attention" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["kernels", "--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["kernels", "--suite", "huge"], "no suite 'huge' for cpu; there are quick on cpu"),
        (["kernels", "--only", "no such case"], "--only no such case leaves no case of suite quick"),
        (["kernels", "--seconds", "0"], "--seconds must be > 0, got 0"),
        (["kernels", "--threads", "-1"], "--threads must be > 0, got -1"),
        (["plot", "missing.jsonl"], "no results file at missing.jsonl"),
        (["table", "missing.jsonl"], "no results file at missing.jsonl"),
        (["plot", "{broken}"], "line 2, is no row of a results file"),
    ],
)
def test_mistakes_have_one_clear_message(bench, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('\n{"operator": 1}\n')
    code, _, err = bench(*(a.format(broken=broken) for a in args))
    assert code == 1
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == [broken]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_cuda_is_refused_where_there_is_none(bench):
    code, _, err = bench("kernels", "--device", "cuda")
    assert code == 1
    assert "torch.cuda.is_available() is False" in err


# --- CUDA --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_every_peer_runs_on_cuda(tmp_path, direction):
    case = BlockSparse(
        N=1024, H=2, D=64, dtype="bfloat16", layout=RandomBlocks(64, 0.5), backends=("auto", "triton"),
        peers=("sdpa", "cudnn", "flash", "flex"), direction=direction,
    )  # fmt: skip
    options = runner.Options(out=tmp_path / "rows.jsonl", pair_seconds=0.1, flex=True)
    rows = runner.run([case], Machine.here(torch.device("cuda")), options, lambda *_: None).rows
    assert [(r.status, r.reason) for r in rows] == [("measured", None)] * 8
    assert all(r.ours_bytes > 0 for r in rows)


def test_flex_refuses_what_it_cannot_do():
    work = workloads.build(small(direction="forward+backward"), CPU)
    with pytest.raises(Unavailable, match="no backward pass on CPU"):
        work.peer("flex")
