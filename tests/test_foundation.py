"""The foundation: configs, the registry and its plugins, errors, the recorder and reports, handles on a toy model."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest

import mmeff
from mmeff import registry
from mmeff.config import MethodConfig, describe, normalise, option
from mmeff.errors import (
    AlreadyAccelerated,
    BackendUnavailable,
    MediaError,
    MmeffError,
    NothingAccelerated,
    UnknownMethod,
    UnsupportedModel,
    suggest,
)
from mmeff.handle import Host, describe_model
from mmeff.report import DENSE, FULL, SPARSE, Plan, Recorder, make_report

verbs = importlib.import_module("mmeff.accelerate")  # `mmeff.accelerate` itself is the function


# --- a toy model with two stages: hooks add and multiply ---------------------------------------------------------------


class Toy:
    """Applies its hooks to a number, one after another, then adds one."""

    def __init__(self) -> None:
        self.adding: list[Any] = []
        self.scaling: list[Any] = []

    def __call__(self, x: float) -> float:
        for hook in [*self.adding, *self.scaling]:
            x = hook(x)
        return x + 1


@dataclass(frozen=True, kw_only=True)
class Adder(MethodConfig):
    """Adds."""

    stage: ClassVar[str] = "adding"
    source: ClassVar[str] = "this test"

    amount: int = option(10, "what is added", unit="units")
    weight: float = option(1.0, "factor of the amount", unit="ratio")
    mode: Literal["plain", "twice"] = option("plain", "how often", source="this test")
    grid: tuple[int, ...] = option((1, 2), "sizes", unit="tokens")
    seed: int | None = option(None, "randomness", unit="seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.amount >= 0, "amount", "be at least 0 units", "pass amount=10")


@dataclass(frozen=True, kw_only=True)
class Scaler(MethodConfig):
    """Multiplies."""

    stage: ClassVar[str] = "scaling"
    source: ClassVar[str] = "this test"

    factor: float = option(2.0, "what is multiplied by", unit="ratio")
    fail_at: str = option("", "where installing fails", source="this test")


class ToyHost(Host):
    models = "Toy"

    @classmethod
    def matches(cls, model):
        return isinstance(model, Toy)

    @classmethod
    def modules(cls, model):
        return [model]

    @classmethod
    def attach(cls, hooks, handle, apply):
        def hook(x):
            handle.recorder.forwards += 1
            if not handle.enabled:
                handle.recorder.call(0, DENSE)
                return x
            handle.recorder.call(0, SPARSE, density=0.5)
            return apply(x)

        hooks.append(hook)
        handle.on_remove(lambda: hooks.remove(hook))

    @classmethod
    def plan(cls, model, method, *, height: int = 1):
        return Plan(
            method=method.to_dict(), model=describe_model(model), host=cls.name,
            rows=(("height", str(height)),), density=0.25, fallbacks=("layer 0 is too small",),
        )  # fmt: skip


class AddingHost(ToyHost):
    name, stage = "toy-adding", "adding"

    @classmethod
    def why_not(cls, model, method):
        return "it is odd" if method.amount % 2 else None

    @classmethod
    def install(cls, model, method, handle):
        cls.attach(model.adding, handle, lambda x: x + method.amount * method.weight)


class ScalingHost(ToyHost):
    name, stage = "toy-scaling", "scaling"

    @classmethod
    def install(cls, model, method, handle):
        if method.fail_at == "begin":
            raise RuntimeError("at the beginning")
        cls.attach(model.scaling, handle, lambda x: x * method.factor)
        if method.fail_at == "end":
            raise RuntimeError("at the end")


@dataclass(frozen=True, kw_only=True)
class Twice(MethodConfig):
    """Does what another method does, twice."""

    stage: ClassVar[str] = "adding"
    source: ClassVar[str] = "this test"

    inner: Adder | None = option(None, "what is done", source="this test")  # noqa: RUF009 - a field like the others


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """A registry and hosts of the toys alone, loaded."""
    monkeypatch.setattr(registry, "_methods", {"adder": Adder, "scaler": Scaler})
    monkeypatch.setattr(registry, "_problems", {})
    monkeypatch.setattr(registry, "_loaded", True)
    monkeypatch.setattr(verbs, "_hosts", [AddingHost, ScalingHost])


@pytest.fixture
def toy():
    model = Toy()
    assert model(1) == 2
    return model


# --- config ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"amount": 1.5}, "Adder.amount must be int, got 1.5 of type float"),
        ({"amount": True}, "Adder.amount must be int, got True of type bool"),
        ({"weight": "1e-5"}, "Adder.weight must be float, got '1e-5' of type str"),
        ({"mode": "thrice"}, "Adder.mode must be one of 'plain', 'twice', got 'thrice' of type str"),
        ({"grid": (1, "2")}, "Adder.grid must be tuple of int, ..., got (1, '2') of type tuple"),
        ({"seed": 0.5}, "Adder.seed must be int or None, got 0.5 of type float"),
    ],
)
def test_wrong_type(fields, message):
    with pytest.raises(TypeError) as error:
        Adder(**fields)
    assert str(error.value) == message


def test_out_of_range():
    with pytest.raises(ValueError) as error:
        Adder(amount=-3)
    assert str(error.value) == "Adder.amount must be at least 0 units, got -3; pass amount=10."


def test_replace_validates():
    assert Adder().replace(amount=4).amount == 4
    with pytest.raises(ValueError, match="amount must be at least 0"):
        Adder().replace(amount=-1)
    with pytest.raises(TypeError, match=r"Adder has no field 'amout'. Did you mean 'amount'\? Fields: amount, weight"):
        Adder().replace(amout=1)


def test_only_lists_and_integers_are_converted():
    method = Adder(weight=2, grid=[3, 4])
    assert (method.weight, type(method.weight), method.grid) == (2.0, float, (3, 4))


def test_a_config_may_hold_another(tmp_path, monkeypatch):
    monkeypatch.setitem(registry._methods, "twice", Twice)
    method = Twice(inner=Adder(amount=4, grid=(5,)))
    method.to_yaml(tmp_path / "a.yaml")
    assert "inner:\n  method: adder\n  amount: 4\n" in (tmp_path / "a.yaml").read_text()
    assert registry.build(tmp_path / "a.yaml") == method and hash(method) == hash(method.replace())
    assert Twice(inner="adder") == Twice(inner={"method": "Adder"}) == Twice(inner=Adder())
    assert [f.type for f in describe(Twice)] == ["Adder or None"]
    with pytest.raises(TypeError, match=r"Twice\.inner must be Adder or None, got 3 of type int"):
        Twice(inner=3)
    with pytest.raises(TypeError, match=r"Twice\.inner must be Adder or None, got Scaler\(.*\) of type Scaler"):
        Twice(inner="scaler")
    with pytest.raises(TypeError, match=r"Adder has no field 'amout'"):
        Twice(inner={"method": "adder", "amout": 4})
    with pytest.raises(UnknownMethod, match=r"Did you mean 'Adder'"):
        Twice(inner="addr")


@pytest.mark.parametrize("weight", [0.1, 1e-5, 1e22, math.inf])
def test_yaml_keeps_values_exactly(tmp_path, weight):
    method = Adder(amount=4, weight=weight, mode="twice", grid=(5,), seed=7)
    text = method.to_yaml(tmp_path / "a.yaml")
    assert (tmp_path / "a.yaml").read_text() == text
    assert text.startswith("method: adder\n")
    assert registry.build(tmp_path / "a.yaml") == method
    assert registry.build(str(tmp_path / "a.yaml"), amount=6) == method.replace(amount=6)


def test_from_dict_refuses_another_method():
    with pytest.raises(ValueError, match=r"Adder\.from_dict got a config of method 'scaler'"):
        Adder.from_dict({"method": "scaler"})


def test_describe():
    amount = describe(Adder)[0]
    assert dataclasses.asdict(amount) == {
        "name": "amount", "type": "int", "default": 10, "doc": "what is added", "unit": "units", "source": "",
    }  # fmt: skip
    assert [f.type for f in describe(Adder)[1:]] == [
        "float", "one of 'plain', 'twice'", "tuple of int, ...", "int or None",
    ]  # fmt: skip


# --- registry ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adder", "Adder", "ADD-er", "add_er", "ad der"])
def test_names_match_without_case_and_separators(name):
    assert registry.get(name) is Adder
    assert normalise(name) == "adder"


def test_unknown_method_lists_near_matches():
    with pytest.raises(UnknownMethod) as error:
        registry.get("addr")
    assert str(error.value) == "no method is called 'addr'. Did you mean 'Adder'? Known: Adder, Scaler."
    with pytest.raises(UnknownMethod, match=r"no method is called 'quux'\. Known: Adder, Scaler\."):
        registry.build("quux")


def test_register_refuses_a_second_class_of_the_same_name():
    def other():
        return type("Adder", (MethodConfig,), {"stage": "adding", "__module__": "elsewhere"})

    with pytest.raises(ValueError, match=r"the method name 'adder' is taken by .*test_foundation\.Adder"):
        registry.register(other())
    assert registry.register(Adder) is Adder  # a module that is imported again


@pytest.mark.parametrize("what", [Toy, Adder(), type("Stageless", (MethodConfig,), {})])
def test_register_refuses_what_is_no_method(what):
    with pytest.raises(TypeError, match="register needs a subclass of MethodConfig with a stage"):
        registry.register(what)


def test_build_takes_every_spelling():
    expected = Adder(amount=4)
    for method in (Adder, Adder(), "adder", {"method": "adder"}, {"method": "Adder", "amount": 8}):
        assert registry.build(method, amount=4) == expected
    assert registry.build(expected) is expected


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (3, TypeError, "a method is a config, its class, its name, a mapping or a YAML path, got int"),
        ({"amount": 4}, ValueError, "a method mapping needs the key 'method', got keys ['amount']"),
        ("gone.yaml", FileNotFoundError, "no config file at gone.yaml; `mmeff list --json` shows every method"),
    ],
)
def test_build_refuses(method, error, message):
    with pytest.raises(error) as raised:
        registry.build(method)
    assert str(raised.value).startswith(message)


def test_yaml_must_hold_a_mapping(tmp_path):
    (tmp_path / "list.yaml").write_text("- adder\n")
    with pytest.raises(ValueError, match=r"list\.yaml must hold a mapping such as `method: radial`, got list"):
        registry.build(tmp_path / "list.yaml")


def test_yaml_is_read_safely(tmp_path):
    (tmp_path / "evil.yaml").write_text("!!python/object/apply:os.getcwd []\n")
    with pytest.raises(Exception, match="could not determine a constructor"):
        registry.build(tmp_path / "evil.yaml")


PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from mmeff.config import MethodConfig, option
from mmeff.registry import register

@register
@dataclass(frozen=True, kw_only=True)
class {name}(MethodConfig):
    "Comes from outside."
    stage: ClassVar[str] = "adding"
    source: ClassVar[str] = "outside"
    amount: int = option(10, "what is added", unit="units")
"""


@pytest.fixture
def install_plugins(tmp_path, monkeypatch):
    """Puts a distribution with the given modules and entry points on the path, and the registry before its first use."""

    def install(**modules: str) -> None:
        points = "".join(f"{name} = mmeff_test_{name}\n" for name in modules)
        info = tmp_path / "mmeff_test_plugins-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mmeff-test-plugins\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[mmeff.methods]\n{points}")
        for name, text in modules.items():
            (tmp_path / f"mmeff_test_{name}.py").write_text(text)
            monkeypatch.delitem(sys.modules, f"mmeff_test_{name}", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(registry, "_loaded", False)

    return install


def test_plugins_are_found(install_plugins):
    install_plugins(subtracter=PLUGIN.format(name="Subtracter"))
    assert registry.get("subtracter").source == "outside"
    assert "subtracter" in [m.name for m in mmeff.methods()]
    assert registry.broken_plugins() == {}


def test_a_broken_plugin_is_named_and_harmless(install_plugins):
    install_plugins(
        bad="import no_such_package_of_mmeff\n",
        clash=PLUGIN.format(name="Scaler"),
        subtracter2=PLUGIN.format(name="Subtracter2"),
    )
    problems = registry.broken_plugins()
    assert "ModuleNotFoundError" in problems["bad = mmeff_test_bad"]
    assert "the method name 'scaler' is taken" in problems["clash = mmeff_test_clash"]
    assert len(problems) == 2
    assert registry.get("scaler") is Scaler
    assert registry.get("subtracter2")
    with pytest.raises(UnknownMethod, match=r"Plugins that failed to load: bad = mmeff_test_bad; clash"):
        registry.get("nothing like it")


# --- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (UnknownMethod, LookupError),
        (UnsupportedModel, TypeError),
        (BackendUnavailable, RuntimeError),
        (AlreadyAccelerated, RuntimeError),
        (NothingAccelerated, RuntimeError),
        (MediaError, ValueError),
    ],
)
def test_errors_are_also_builtins(error, builtin):
    assert issubclass(error, MmeffError)
    assert issubclass(error, builtin)
    assert str(error("as written")) == "as written"


def test_suggest():
    known = ["FastV", "PyramidDrop", "Radial"]
    assert suggest("fastw", known) == " Did you mean 'FastV'?"
    assert suggest("zzzzzz", known) == ""
    assert suggest("aaab", ["aaaa", "aaac", "xyz"]).count(" or ") == 1


# --- recorder and report -----------------------------------------------------------------------------------------------


def test_report_counts_what_ran():
    recorder = Recorder()
    recorder.forwards = 2
    for step in (0, 1):
        recorder.call(0, DENSE, step=step)
        recorder.call(3, SPARSE if step else FULL, step=step, density=0.25 if step else 1.0, backend="gather")
    recorder.fallback("too short")
    recorder.fallback("too short")
    recorder.add_seconds("prefill", 0.5)
    recorder.add_seconds("prefill", 0.25)
    report = make_report(recorder, method=Adder().to_dict(), model="Toy", host="toy", note="a toy")
    assert report.calls == {SPARSE: 1, FULL: 1, DENSE: 2}
    assert report.accelerated == 1
    assert report.layers == {0: {DENSE: 2}, 3: {FULL: 1, SPARSE: 1, "density": 0.625}}
    assert report.steps == {0: {DENSE: 1, FULL: 1}, 1: {DENSE: 1, SPARSE: 1}}
    assert report.density == 0.625
    assert report.backends == {"gather": 2}
    assert report.fallbacks == {"too short": 2}
    assert (report.seconds, report.spans) == ({"prefill": 0.75}, {"prefill": 2})
    text = str(report)
    for piece in (
        "adder(amount=10, weight=1.0",
        "on Toy through the toy host",
        "note: a toy",
        "layer calls: 1 sparse, 1 full, 2 dense (of 4)",
        "mean density where the method acted: 0.625",
        "backends: gather x2",
        "prefill: 0.750 s in 2 calls",
        "fell back to dense x2: too short",
    ):
        assert piece in text


def test_report_is_a_snapshot_of_plain_types():
    recorder = Recorder()
    recorder.call(0, SPARSE, step=0, density=0.5)
    recorder.kept[2] = SimpleNamespace(tolist=lambda: [[0, 5]])
    report = make_report(recorder, method={"method": "adder"}, model="Toy", host="toy")
    recorder.call(0, SPARSE, step=0)
    recorder.reset()
    assert report.calls[SPARSE] == 1
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["kept"] == {"2": [[0, 5]]}
    assert plain["layers"] == {"0": {SPARSE: 1, "density": 0.5}}
    assert plain["environment"]["python"]
    assert "cores" in plain["environment"]["cpu"]


def test_empty_report_says_so():
    report = make_report(Recorder(), method={"method": "adder"}, model="Toy", host="toy")
    assert "nothing has run yet" in str(report)
    assert (report.calls, report.density, report.accelerated) == ({}, None, 0)


def test_recorder_times_also_what_fails():
    recorder = Recorder()
    with pytest.raises(KeyError), recorder.time("select"):
        raise KeyError
    assert recorder.seconds()["select"] > 0
    assert recorder.spans() == {"select": 1}
    recorder.reset()
    assert recorder.seconds() == {}


def test_plan_prints_rows_and_reasons(toy):
    plan = mmeff.plan(toy, "adder", height=3, amount=2)
    assert plan.method["amount"] == 2
    assert str(plan).splitlines()[1:] == [
        "  on Toy through the toy-adding host",
        "  height  3",
        "  note: layer 0 is too small",
    ]
    assert json.loads(json.dumps(plan.to_dict()))["density"] == 0.25
    assert toy(1) == 2
    assert not toy.adding


def test_plan_refuses_sizes_that_do_not_exist(toy):
    with pytest.raises(TypeError, match="heigth"):
        mmeff.plan(toy, "adder", heigth=3)
    with pytest.raises(ValueError, match="amount must be at least 0"):
        mmeff.plan(toy, "adder", amount=-1)


# --- handles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Adder(), Adder, "adder", {"method": "adder"}])
def test_accelerate_installs_and_remove_restores(toy, method):
    handle = mmeff.accelerate(toy, method)
    assert toy(1) == 12
    assert handle.installed
    handle.remove()
    assert toy(1) == 2
    assert not handle.installed
    handle.remove()  # twice is allowed
    assert handle.report().calls[SPARSE] == 1  # what ran stays known


def test_fields_replace_defaults(toy):
    with mmeff.accelerate(toy, Adder(amount=4), weight=2):
        assert toy(1) == 10


def test_enabled_is_a_live_dial(toy):
    handle = mmeff.accelerate(toy, "adder")
    handle.enabled = False
    assert toy(1) == 2
    handle.enabled = True
    assert toy(1) == 12
    assert handle.report().calls == {SPARSE: 1, FULL: 0, DENSE: 1}
    assert "adder on Toy: on" in repr(handle)
    handle.reset()
    assert handle.report().calls == {}
    assert toy(1) == 12
    handle.remove()
    assert "removed" in repr(handle)


def test_two_models_do_not_share_anything():
    first, second = Toy(), Toy()
    with mmeff.accelerate(first, "adder") as one, mmeff.accelerate(second, "adder", amount=100) as two:
        assert (first(1), second(1)) == (12, 102)
        assert second(1) == 102
        assert (one.report().calls[SPARSE], two.report().calls[SPARSE]) == (1, 2)
        assert (one.report().method["amount"], two.report().method["amount"]) == (10, 100)


def test_leaving_a_block_on_an_error_removes(toy):
    with pytest.raises(KeyError), mmeff.accelerate(toy, "adder"):
        raise KeyError
    assert toy(1) == 2


def test_a_stage_is_taken_once(toy):
    handle = mmeff.accelerate(toy, "adder")
    with pytest.raises(AlreadyAccelerated, match=r"Toy already runs adder of stage 'adding'; call remove\(\)"):
        mmeff.accelerate(toy, Adder(amount=2))
    assert toy(1) == 12
    handle.remove()
    with mmeff.accelerate(toy, Adder(amount=2)):
        assert toy(1) == 4


def test_a_handle_that_nobody_keeps_stays_installed(toy):
    mmeff.accelerate(toy, "adder")
    gc.collect()
    assert toy(1) == 12
    with pytest.raises(AlreadyAccelerated):
        mmeff.accelerate(toy, "adder")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_stacked_stages_are_removed_in_any_order(toy, order):
    handles = [mmeff.accelerate(toy, "adder"), mmeff.accelerate(toy, "scaler")]
    assert toy(1) == 23
    handles[order[0]].remove()
    assert toy(1) == (3 if order[0] == 0 else 12)
    handles[order[1]].remove()
    assert toy(1) == 2


def test_a_list_stacks(toy):
    with mmeff.accelerate(toy, ["scaler", Adder(amount=4)]) as stack:
        assert toy(1) == 11
        assert [r.method["method"] for r in stack.report()] == ["scaler", "adder"]
        assert stack.enabled
        stack.enabled = False
        assert toy(1) == 2
        assert not stack.enabled
        stack.enabled = True
        stack.reset()
        assert toy(1) == 11
        assert [r.calls[SPARSE] for r in stack.report()] == [1, 1]
    assert toy(1) == 2


@pytest.mark.parametrize(
    ("methods", "fields", "error", "message"),
    [
        ([], {}, ValueError, "empty list of methods"),
        (["adder"], {"amount": 4}, TypeError, r"fields \(amount\) are ambiguous for a list"),
        (["adder", "aderr"], {}, UnknownMethod, "Did you mean 'Adder'"),
        (["adder", "adder"], {}, AlreadyAccelerated, "already runs adder"),
        (["adder", Scaler(fail_at="begin")], {}, RuntimeError, "at the beginning"),
        (["adder", Scaler(fail_at="end")], {}, RuntimeError, "at the end"),
    ],
)
def test_a_list_that_fails_leaves_nothing_behind(toy, methods, fields, error, message):
    with pytest.raises(error, match=message):
        mmeff.accelerate(toy, methods, **fields)
    assert toy(1) == 2
    with mmeff.accelerate(toy, ["adder", "scaler"]):  # no stage is still taken
        assert toy(1) == 23


@pytest.mark.parametrize("where", ["begin", "end"])
def test_an_install_that_fails_leaves_nothing_behind(toy, where):
    with pytest.raises(RuntimeError, match="at the"):
        mmeff.accelerate(toy, Scaler(fail_at=where))
    assert toy(1) == 2
    with mmeff.accelerate(toy, "scaler"):
        assert toy(1) == 3


def test_nothing_accelerated_is_an_error(toy):
    with (
        pytest.raises(
            NothingAccelerated, match=r"adder was installed on Toy and the model ran 1 times, but all 1 .* dense"
        ),
        mmeff.accelerate(toy, "adder") as handle,
    ):
        handle.enabled = False
        toy(1)
        handle.enabled = True
    assert toy(1) == 2


def test_fallback_reasons_reach_the_error(toy):
    with (
        pytest.raises(NothingAccelerated, match="were dense: too short"),
        mmeff.accelerate(toy, "adder") as handle,
    ):
        handle.recorder.forwards += 1
        handle.recorder.fallback("too short")


@pytest.mark.parametrize("use", ["never run", "switched off", "ran full", "failed"])
def test_when_nothing_accelerated_is_no_error(toy, use):
    try:
        with mmeff.accelerate(toy, "adder") as handle:
            if use == "switched off":
                handle.enabled = False
                toy(1)
            elif use == "ran full":
                handle.recorder.forwards += 1
                handle.recorder.call(0, FULL)
            elif use == "failed":
                handle.recorder.forwards += 1
                raise KeyError
    except KeyError:
        assert use == "failed"


def test_unknown_model_lists_what_is_supported():
    with pytest.raises(UnsupportedModel) as error:
        mmeff.accelerate(object(), "adder")
    assert str(error.value) == (
        "no host of stage 'adding' knows builtins.object, so adder cannot be installed. Supported: toy-adding (Toy)."
    )


def test_a_method_of_the_wrong_stage_names_the_right_ones(toy, monkeypatch):
    monkeypatch.setattr(verbs, "_hosts", [AddingHost])
    with pytest.raises(UnsupportedModel, match=r"This model takes methods of stage adding: Adder\."):
        mmeff.accelerate(toy, "scaler")


def test_a_host_can_refuse_with_a_reason(toy):
    with pytest.raises(UnsupportedModel, match="adder cannot act on this Toy: it is odd"):
        mmeff.accelerate(toy, Adder(amount=3))
    with pytest.raises(UnsupportedModel, match="it is odd"):
        mmeff.plan(toy, Adder(amount=3))


def test_reports_name_model_and_note():
    class Loaded(Toy):
        config = SimpleNamespace(_name_or_path="some/where")
        mmeff_note = "random weights"

    handle = mmeff.accelerate(Loaded(), "adder")
    assert (handle.report().model, handle.report().note) == ("Loaded (some/where)", "random weights")
    assert describe_model(SimpleNamespace(config={"_name_or_path": "a/b"})) == "SimpleNamespace (a/b)"


def test_configs_are_written_where_asked(tmp_path):
    path: Path = tmp_path / "x.yaml"
    assert Adder().to_yaml() == Adder().to_yaml(path) == path.read_text()


# --- what must not be half done ----------------------------------------------------------------------------------------


def test_one_undo_that_raises_does_not_stop_the_others(toy):
    def broken():
        raise OSError("broken undo")

    stack = mmeff.accelerate(toy, ["adder", "scaler"])
    stack.handles[1].on_remove(broken)
    with pytest.raises(OSError, match="broken undo"):
        stack.remove()
    assert toy(1) == 2
    with mmeff.accelerate(toy, ["adder", "scaler"]):
        assert toy(1) == 23


def test_a_room_that_cannot_be_imported_fails_every_time(monkeypatch):
    def broken(room):
        raise ImportError(room)

    monkeypatch.setattr(registry, "_loaded", False)
    monkeypatch.setattr(registry, "import_methods", broken)
    for _ in range(2):
        with pytest.raises(ImportError, match=r"mmeff\.pruning"):
            registry.all_methods()


def test_a_host_that_cannot_be_imported_fails_every_time(monkeypatch):
    def load(name):
        if name == "mmeff.diffusion_attn.hosts":
            raise ImportError(name)
        return importlib.import_module(name)

    monkeypatch.setattr(verbs, "_hosts", [])
    monkeypatch.setattr(verbs, "importlib", SimpleNamespace(import_module=load))
    for _ in range(2):
        with pytest.raises(ImportError, match="diffusion_attn"):
            verbs.hosts()


def test_integers_become_floats_inside_tuples_too():
    @dataclass(frozen=True, kw_only=True)
    class Ratios(MethodConfig):
        values: tuple[float, ...] = (1.0,)
        pair: tuple[float, int] | None = None

    method = Ratios(values=[1, 0.5], pair=[2, 3])
    assert (method.values, method.pair) == ((1.0, 0.5), (2.0, 3))
    assert [type(v) for v in (*method.values, *method.pair)] == [float, float, float, int]
    with pytest.raises(TypeError, match=r"Ratios\.pair must be tuple of float, int or None"):
        Ratios(pair=[1])


def test_plan_takes_fields_beside_a_config(toy):
    assert mmeff.plan(toy, Adder(weight=3.0), amount=4, height=2).method == Adder(weight=3.0, amount=4).to_dict()


def test_an_entry_point_may_name_a_class_that_does_not_register_itself(install_plugins, tmp_path):
    install_plugins(plain=PLUGIN.format(name="Plain").replace("@register\n", ""))
    points = tmp_path / "mmeff_test_plugins-1.0.dist-info/entry_points.txt"
    points.write_text("[mmeff.methods]\nplain = mmeff_test_plain:Plain\n")
    assert registry.get("plain").__name__ == "Plain"


def test_suggest_takes_an_iterator():
    assert suggest("fastw", iter(["FastV"])) == " Did you mean 'FastV'?"


def test_a_dictionary_of_a_report_is_a_copy():
    recorder = Recorder()
    recorder.call(0, SPARSE)
    report = make_report(recorder, method={"method": "adder"}, model="Toy", host="toy")
    report.to_dict()["calls"][SPARSE] = 99
    assert report.calls[SPARSE] == 1
