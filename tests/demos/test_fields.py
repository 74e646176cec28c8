"""Forms: every field of every method, there and back; nothing that names a file or a model."""

from __future__ import annotations

import gradio as gr
import pytest

from demos import presets
from demos.fields import Form, config_from, entered, methods_of, open_fields, shape_of, shown
from mmeff.config import describe
from mmeff.errors import UnknownMethod
from mmeff.registry import all_methods, build


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_defaults_survive_the_form(name):
    cls = all_methods()[name]
    with gr.Blocks():
        form = Form(cls)
    assert form.names == [info.name for info in open_fields(cls)]
    for component, info in zip(form.components, open_fields(cls), strict=True):
        assert info.name.replace("_", " ") in component.label and (info.doc in component.info)
        assert info.unit in component.label
    assert form.read([component.value for component in form.components]) == build(name)
    assert form.read(form.values()) == build(name)


@pytest.mark.parametrize("model", ["tiny-video", "tiny-image"])
def test_presets_build(model):
    for name, cls in methods_of("diffusion_attn").items():
        with gr.Blocks():
            form = Form(cls, presets.preset(model, name))
        want = build(name, **presets.preset(model, name))
        assert form.read([component.value for component in form.components]) == want
        assert form.read(form.values(presets.preset(model, name))) == want
    assert presets.preset("another", "radial") == {}


def test_every_method_of_a_stage_is_there():
    for stage in ("pruning", "diffusion_attn", "vision_backbones"):
        assert set(methods_of(stage)) == {name for name, cls in all_methods().items() if cls.stage == stage}


def test_fields_that_name_files_or_models_are_closed():
    closed = {
        (name, info.name)
        for name, cls in all_methods().items()
        for info in describe(cls)
        if info.name not in {one.name for one in open_fields(cls)}
    }
    assert {("cacovid", "policy"), ("cdpruner", "clip"), ("cdpruner", "tokenizer")} <= closed
    with pytest.raises(ValueError, match=r"CaCoVID.policy names something on the server"):
        config_from({"method": "cacovid", "policy": "/etc"}, "pruning")
    with pytest.raises(ValueError, match=r"CaCoVID.policy names something on the server"):
        config_from({"method": "debiased", "inner": {"method": "cacovid", "policy": "/etc"}}, "pruning")


@pytest.mark.parametrize(
    "given", ["/etc/x.yaml", "x.yml", {"method": "../x.yaml"}, {"method": "debiased", "inner": "/tmp/x.yaml"}]
)
def test_no_file_is_read(given):
    with pytest.raises(UnknownMethod):
        config_from(given, "pruning")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "a method must be a name, or a mapping"),
        ({}, "a method must be a name, or a mapping"),
        ({"method": 3}, "a method must be a name, or a mapping"),
        ({"method": "radial", "dekay": 1.0}, "has no field 'dekay'"),
        ({"method": "radial", "decay": "x" * 10_000}, "Radial.decay must be float"),
        ({"method": "fastv"}, "is a method of stage pruning"),
        ({"method": "rectifiedspaattn", "base": 3}, "RectifiedSpaAttn.base must be a method's name"),
        ({"method": "rectifiedspaattn", "base": {}}, "RectifiedSpaAttn.base must be a method's name"),
        ("q" * 5000, "no method is called"),
    ],
)
def test_what_a_program_sends_wrongly(given, message):
    with pytest.raises((TypeError, ValueError, LookupError), match=message) as caught:
        config_from(given, "diffusion_attn")
    assert len(str(caught.value)) < 11_000


def test_methods_inside_methods():
    config = config_from({"method": "rectifiedspaattn", "base": {"method": "radial", "block": 64}}, "diffusion_attn")
    assert config.base == build("radial", block=64)
    assert config_from({"method": "rectifiedspaattn", "base": ""}, "diffusion_attn").base is None
    deep = {"method": "debiased", "inner": "debiased"}
    for _ in range(6):
        deep = {"method": "debiased", "inner": deep}
    with pytest.raises((TypeError, ValueError)):
        config_from(deep, "pruning")


def test_text_fields():
    gna = all_methods()["gna"]
    assert entered(gna, "window", "[0.5, all, 3]") == [0.5, "all", 3]
    assert shown(gna, "window", (0.5, "all", 3)) == "[0.5, all, 3]"
    assert entered(gna, "tile", "") is None and shown(gna, "tile", None) == ""
    with pytest.raises(ValueError, match=r"GNA.window must be a number or a list such as \[1, 2\], got '\[1, '"):
        entered(gna, "window", "[1, ")
    with pytest.raises(ValueError, match="at most 300 characters, got 301"):
        entered(gna, "window", "1" * 301)
    with pytest.raises(ValueError, match=r"Radial.block must be a number, got an empty field"):
        entered(all_methods()["radial"], "block", None)
    assert shape_of(all_methods()["fastv"], "schedule") == "word"  # "2:0.5" is a number in YAML
    assert entered(all_methods()["fastv"], "schedule", "2:0.5") == "2:0.5"


def test_python_objects_in_yaml_are_refused():
    with pytest.raises(ValueError, match="must be a number or a list"):
        entered(all_methods()["gna"], "window", "!!python/object/apply:os.system [ls]")
