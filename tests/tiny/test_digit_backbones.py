"""The embedded backbones: they load by name, read the digits that were held out, and what is written comes back."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import digits
from mmeff import tiny
from mmeff.tiny import digit_backbones


@pytest.mark.parametrize("name", tiny.backbones())
def test_what_the_config_says_of_accuracy_holds(name):
    model, config = tiny.backbone(name)
    data = digits.pictures(config["input_size"][-1])
    assert (data.mean, data.std) == pytest.approx((config["mean"][0], config["std"][0]))
    found = digits.accuracy(model, data.test, data.test_digits)
    assert found == pytest.approx(config["accuracy"], abs=2 / len(data.test)) and found >= digits.BAR
    assert config["held_out"] == len(data.test)


def test_there_are_two_of_them_at_least():
    assert {"digits-biformer", "digits-dinat_s"} <= set(tiny.backbones())


def test_saved_models_come_back(tmp_path):
    family = digits.FAMILIES[0]
    model = family.build(digits.REFERENCE).eval()
    config = {"model": family.model, "args": {"in_chans": 1, "num_classes": 10, **family.small}}
    digit_backbones.save(model, tmp_path / "new", "one", config)
    assert digit_backbones.names(tmp_path / "new") == ("one",) and digit_backbones.names(tmp_path / "none") == ()
    again, read = digit_backbones.load(tmp_path / "new", "one")
    assert read == json.loads(json.dumps(config)) and not again.training
    x = torch.randn(2, 1, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=1e-2, atol=1e-2)  # weights were rounded to float16
    with pytest.raises(ValueError, match="must be one of one, got 'two'"):
        digit_backbones.load(tmp_path / "new", "two")
