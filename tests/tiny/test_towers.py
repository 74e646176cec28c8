"""The tiny VLM behind one of our backbones: it trains, resumes, comes back as a stock class, and is pruned like any other."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import timm
import torch

import mmeff
import mmeff.vision_backbones
from mmeff import tiny, training
from mmeff.errors import UnknownMethod, UnsupportedModel
from mmeff.evaluation import gates, gates_tower
from mmeff.evaluation.questions import picture
from mmeff.pruning import AdaptInfer, FastV
from mmeff.tiny import export, scenes, towers, train_vlm, vlm_model

TOWERS = [
    "biformer_tiny", "biformer_stl_nchw", "nat_mini", "dinat_large_384_k11", "dinat_s_tiny", "dinat_iso_small", "vitrpb_base",
    "focalnet_base_iso",
]  # fmt: skip
FEW = {"see_steps": 2, "read_steps": 2, "join_steps": 2, "batch": 2, "questions": 3}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return vlm_model.model(tower="biformer_tiny").eval()


@pytest.fixture(scope="module")
def folder(net, tmp_path_factory):
    return export.export_vlm(net, tmp_path_factory.mktemp("tower") / "model")


@pytest.fixture(scope="module")
def inputs():
    questions = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([torch.ones(2, 1, dtype=torch.long), torch.full((2, vlm_model.VISUAL), 4), questions], dim=1)
    return {"input_ids": ids, "pixel_values": vlm_model.pixels(scenes.sample(5, 0, 2).images)}


# ---------------------------------------------------------------- the tower


@pytest.mark.parametrize("name", TOWERS)
def test_every_family_sees_one_token_per_patch(name):
    torch.manual_seed(0)
    net = vlm_model.model(tower=name)
    tower = net.model.vision_tower.timm_model
    assert tower.reduction == vlm_model.PATCH and 1e5 < sum(p.numel() for p in tower.parameters()) < 1.2e6
    x = torch.randn(2, 3, scenes.SIZE, scenes.SIZE)
    features, states = train_vlm.look(net, x)
    assert features.shape == (2, vlm_model.VISUAL, vlm_model.DIM)
    assert all(state.shape == (2, 1 + vlm_model.VISUAL, vlm_model.DIM) for state in states)
    features.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.parameters())


def test_every_registered_family_has_a_small_member_but_one():
    small, without = [], []
    for name in mmeff.vision_backbones.registered():
        try:
            towers.model_args(name, size=96, patch=8)
            small.append(name)
        except ValueError:
            without.append(name)
    assert without == ["focalnet_large_fl4_normalized"] and len(small) >= 30


def test_tokens_are_the_feature_map_row_by_row():
    small = {"embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
    for index, level in ((1, 1), (-1, 3)):
        torch.manual_seed(0)
        tower = timm.create_model("vision_tower", backbone="nat_mini", index=index, backbone_args=small).eval()
        torch.manual_seed(0)
        whole = timm.create_model("nat_mini", features_only=True, **small).eval()
        x = torch.randn(2, 3, 64, 96)
        found = whole(x)[level]
        wanted = torch.nn.functional.layer_norm(found.permute(0, 2, 3, 1).flatten(1, 2), found.shape[1:2])
        assert (tower(x) - wanted).abs().max() < 1e-5
        assert tower.num_features == found.shape[1] and tower.reduction == 64 // found.shape[2]
        last, maps = tower.forward_intermediates(x, indices=[-1])
        assert len(maps) == 1 and last is maps[0] and torch.equal(tower.forward_head(last), last.mean(1))


def test_a_tower_takes_the_weights_of_a_file(tmp_path):
    small = {"embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
    torch.save(timm.create_model("nat_mini", **small).state_dict(), tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth")}
    asked = {"backbone": "nat_mini", "index": 0, "backbone_args": small}
    a, b = (timm.create_model("vision_tower", pretrained=True, pretrained_cfg_overlay=overlay, **asked) for _ in "ab")
    fresh = timm.create_model("vision_tower", **asked)
    name = "net.model.stages.0.blocks.0.attn.qkv.weight"
    assert torch.equal(a.state_dict()[name], torch.load(tmp_path / "w.pth")["stages.0.blocks.0.attn.qkv.weight"])
    assert torch.equal(a.state_dict()[name], b.state_dict()[name])
    assert not torch.equal(a.state_dict()[name], fresh.state_dict()[name])


def test_what_a_tower_refuses():
    with pytest.raises(ValueError, match="num_classes must be left out, got 10"):
        timm.create_model("vision_tower", backbone="nat_mini", num_classes=10)
    tower = timm.create_model("vision_tower", **towers.model_args("nat_mini", size=96, patch=8))
    with pytest.raises(ValueError, match=r"indices must be \[0\] or \[-1\], got \[0, 1\]"):
        tower.forward_intermediates(torch.randn(1, 3, 32, 32), indices=[0, 1])
    with pytest.raises(UnknownMethod, match=r"no backbone is called 'biformer_tinny'.*biformer_tiny"):
        vlm_model.model(tower="biformer_tinny")
    with pytest.raises(ValueError, match=r"must be one of biformer_base, .*, got resnet18, of which none is small"):
        vlm_model.model(tower="resnet18")


def test_checkpointing_changes_no_gradient(inputs):
    torch.manual_seed(0)
    tower = vlm_model.model(tower="nat_mini").model.vision_tower
    grads = []
    for enable in (False, True):
        tower.timm_model.set_grad_checkpointing(enable)
        assert all(stage.grad_checkpointing is enable for stage in tower.timm_model.net.model.stages)
        tower.zero_grad()
        tower(inputs["pixel_values"]).last_hidden_state.square().sum().backward()
        grads.append([p.grad.clone() for p in tower.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_the_backbone_starts_as_its_family_does(net):
    """transformers would draw every weight of a convolution with deviation 0.02; a family has its own, five times larger."""
    first = net.model.vision_tower.timm_model.net.model.stem[0].weight
    assert first.std() > 0.06


# ---------------------------------------------------------------- a stock class


def test_a_fresh_process_loads_it_by_stock_classes(net, folder, inputs, tmp_path):
    torch.save(inputs, tmp_path / "inputs.pt")
    code = f"""
import torch, mmeff.vision_backbones
from transformers import AutoProcessor, LlavaForConditionalGeneration
model = LlavaForConditionalGeneration.from_pretrained({str(folder)!r}, dtype=torch.float32).eval()
assert type(model.model.vision_tower).__module__.startswith("transformers.")
assert AutoProcessor.from_pretrained({str(folder)!r}).num_additional_image_tokens == 0
with torch.no_grad():
    torch.save(model(**torch.load({str(tmp_path / "inputs.pt")!r})).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
    with torch.no_grad():
        wanted = net(**inputs).logits  # export_vlm rounds the network to float16 and leaves it so
    found = torch.load(tmp_path / "logits.pt")
    assert (found - wanted).abs().max() < 1e-5 and found.std() > 0.01


def test_the_command_line_loads_it(folder, tmp_path):
    code = "import sys; from mmeff import cli; sys.argv[0] = 'mmeff'; cli.main()"
    asked = [
        "ask",
        "what color is the cross ?",
        "-m",
        str(folder),
        "-i",
        str(tiny.data_folder() / "samples" / "scene-2.png"),
        "--new-tokens",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *asked], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_processor_asks_for_the_tokens_that_the_tower_gives(folder):
    model, processor = tiny.load_vlm(folder)
    batch = scenes.sample(5, 0, 2)
    found = processor(
        text=["<image> what color is the cross ?"] * 2, images=[picture(x) for x in batch.images], return_tensors="pt"
    )
    assert (found["input_ids"] == model.config.image_token_id).sum(1).tolist() == [vlm_model.VISUAL] * 2
    out = model.generate(**found, max_new_tokens=3, do_sample=False)
    assert out.shape[0] == 2 and found["input_ids"].shape[1] < out.shape[1] <= found["input_ids"].shape[1] + 3


@pytest.mark.parametrize("method", [FastV(layer=2, keep=0.25), AdaptInfer(budget=0.5)], ids=["fastv", "adaptinfer"])
def test_methods_inside_the_language_model_prune_it(net, inputs, method):
    with torch.no_grad():
        before = net(**inputs).logits
        with mmeff.accelerate(net, method) as handle:
            net.generate(**inputs, max_new_tokens=2, do_sample=False)
            report = handle.report()
        assert report.accelerated and not report.fallbacks
        last = report.kept[max(report.kept)]
        assert last.shape[0] == 2 and last.shape[1] < vlm_model.VISUAL and last.max() < vlm_model.VISUAL
        assert torch.equal(net(**inputs).logits, before)


def test_methods_that_look_at_the_encoder_refuse_it(net, inputs):
    with torch.no_grad():
        before = net(**inputs).logits
    for name in ("visionzip", "vtccls"):
        with pytest.raises(UnsupportedModel, match="needs the class token, which the llava host does not have"):
            mmeff.accelerate(net, name)
    with pytest.raises(
        UnsupportedModel, match="TimmWrapperModel has no layers where encoders of known families have them"
    ):
        mmeff.accelerate(net, "zooprune")
    with torch.no_grad():
        assert torch.equal(net(**inputs).logits, before), "a refused method leaves nothing behind"


# ---------------------------------------------------------------- training


def test_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    """All three stages, and statistics of batch norm, which are no parameters."""
    recipe = train_vlm.VlmRecipe(tower="biformer_tiny", **FEW)
    straight = train_vlm.train(recipe, tmp_path / "a")
    rows = training.logged(tmp_path / "a")
    assert rows[-1]["step"] == 6 and not straight.training

    class Stop(Exception):
        pass

    steps = []

    def stop_after_three(self, *args, **kwargs):
        if len(steps) == 3:
            raise Stop
        steps.append(1)
        return step(self, *args, **kwargs)

    step = training.MuonWithAdamW.step
    monkeypatch.setattr(train_vlm, "CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(training.MuonWithAdamW, "step", stop_after_three)
    with pytest.raises(Stop):
        train_vlm.train(recipe, tmp_path / "b")
    monkeypatch.setattr(training.MuonWithAdamW, "step", step)
    assert training.Run(tmp_path / "b", json.loads((tmp_path / "b" / "config.json").read_text())).load()[1] == {
        "step": 3, "stage": "read"
    }  # fmt: skip
    resumed = train_vlm.train(recipe, tmp_path / "b")
    for (name, a), (_, b) in zip(straight.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-6), name


def test_a_network_without_matrices_trains(tmp_path):
    """FocalNet's linear layers are convolutions, which Muon does not take."""
    net = train_vlm.train(train_vlm.VlmRecipe(tower="focalnet_tiny_iso", **{**FEW, "join_steps": 1}), tmp_path)
    assert all(p.isfinite().all() for p in net.parameters())


def test_a_folder_of_another_tower_is_refused_and_one_of_clip_knows_of_none(tmp_path):
    train_vlm.train(train_vlm.VlmRecipe(**{**FEW, "read_steps": 0, "join_steps": 0}), tmp_path)
    assert "tower" not in json.loads((tmp_path / "config.json").read_text()), "runs from before towers go on"
    with pytest.raises(ValueError, match="other values of tower"):
        train_vlm.train(train_vlm.VlmRecipe(tower="nat_mini", **{**FEW, "read_steps": 0, "join_steps": 0}), tmp_path)


def test_the_gate_and_the_card(folder, tmp_path):
    copy = export.export_vlm(tiny.load_vlm(folder)[0], tmp_path / "model")
    said = []
    gate = gates.vlm_gate(copy, held_out=8, pruning=8, say=said.append)
    assert set(gate["costs"]) == {"random_cost", "fastv_cost"} and not gate["passed"], "it is not trained"
    assert "class token" not in " ".join(said)
    gates_tower.seal_tower(copy, train_vlm.VlmRecipe(tower="biformer_tiny"), gate)
    export.verify(copy)
    card = (copy / "README.md").read_text()
    assert "# tiny-vlm-biformer_tiny" in card and "Gate: missed" in card and "| tower | biformer_tiny |" in card


def test_the_command_names_folders_after_the_tower(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from mmeff import cli_train

    asked = {}
    monkeypatch.setenv("MMEFF_TRAIN_ENVIRONMENT", "1")
    monkeypatch.setattr(train_vlm, "train", lambda recipe, work, progress: asked.update(recipe=recipe, work=work))
    monkeypatch.setattr(export, "export_vlm", lambda net, out: asked.update(out=out))
    monkeypatch.setattr(gates, "vlm_gate", lambda out, say: {"passed": True})
    monkeypatch.setattr(gates, "seal_vlm", lambda *a: asked.update(sealed="clip"))
    monkeypatch.setattr(gates_tower, "seal_tower", lambda *a: asked.update(sealed="tower"))
    few = ["--join-steps", "3"]
    for args, suffix, sealed, steps in (
        (["--tower", "nat_mini", *few], "-nat_mini", "tower", 3), (few, "", "clip", 3),
        (["--tower", "nat_mini"], "-nat_mini", "tower", 2600), ([], "", "clip", 1300),
    ):  # fmt: skip
        result = CliRunner().invoke(cli_train.train_app, ["tiny-vlm", *args])
        assert result.exit_code == 0, result.output
        assert str(asked["out"]) == f"runs/tiny-vlm{suffix}" and str(asked["work"]) == f"runs/train-tiny-vlm{suffix}"
        assert asked["recipe"].tower == suffix[1:] and asked["recipe"].join_steps == steps and asked["sealed"] == sealed


def test_positions_are_part_of_the_tokens_and_of_the_weights():
    args = {"backbone": "nat_mini", "index": 1, "backbone_args": {"depths": [1, 1, 1, 1], "num_heads": [2, 4, 4, 4]}}
    plain = timm.create_model("vision_tower", **args).eval()
    placed = timm.create_model("vision_tower", grid=[8, 12], **args).eval()
    assert placed.load_state_dict(plain.state_dict(), strict=False).missing_keys == ["positions"]
    picture = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        assert torch.equal(placed(picture), plain(picture) + placed.positions)
    with pytest.raises(
        ValueError, match=r"positions for maps of \(8, 12\) tokens, and pictures of \(64, 64\) pixels make \(8, 8\)"
    ):
        placed(torch.randn(1, 3, 64, 64))
