"""The tiny VLA: its recipe learns, resumes and aggregates; packing is exact; the committed policy acts as its card says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mmeff import tiny, training
from mmeff.evaluation.questions import picture
from mmeff.tiny import export, manipulation, train_vla, vla_model, vlm_model

DATA = tiny.data_folder() / "tiny-vla"
SHORT = {"see_steps": 1, "read_steps": 1, "join_steps": 2, "drop_steps": 2, "batch": 2, "aggregate_episodes": 2}


def untrained():
    torch.manual_seed(0)
    return vla_model.model().eval()


def test_words_of_the_vlm_keep_their_numbers():
    tokenizer = vla_model.processor().tokenizer
    words = tokenizer.get_vocab()
    old = vlm_model.tokenizer().get_vocab()
    assert {w: words[w] for w in old} == old
    assert len(words) <= 64
    tables, _ = manipulation.sample(1, range(8))
    for text in [*tables.instructions(), " ".join(manipulation.X_WORDS + manipulation.Y_WORDS + manipulation.GRIPS)]:
        assert words["<unk>"] not in tokenizer(text)["input_ids"]


def test_labels_are_what_the_expert_does():
    tables, state = manipulation.sample(2, range(6))
    asked = train_vla.ask(tables, state)
    words = vla_model.processor().tokenizer
    for b in range(6):
        texts = [words.decode(ids).split() for ids in asked.ids[b]]
        assert len({" ".join(t[: train_vla.SAID]) for t in texts}) == 4
        assert " ".join(texts[0][: train_vla.SAID]) == tables.instructions()[b]
        for text in texts:
            named = " ".join(text[: train_vla.SAID])
            ((pick, place),) = [(p, r) for p in range(3) for r in (3, 4) if tables.instruction(b, p, r) == named]
            expected = manipulation.expert(state, np.full(6, pick), np.full(6, place))[b]
            assert manipulation.read_action(" ".join(text[train_vla.SAID : -1])) == tuple(expected)
            assert text[-1] == "</s>"
    back = (asked.what[:, 0].numpy() + 1) * 48
    assert np.abs(back - state.centre[np.arange(6), tables.pick]).max() < 1e-4
    assert torch.allclose(
        asked.gripper + asked.way, asked.what, atol=1e-6
    )  # nothing is held: the way leads to the object


def test_patch_truth_names_the_gripper_first():
    tables, state = manipulation.sample(3, range(4))
    truth = train_vla.patch_truth(tables, state, manipulation.render(tables, state)[1])
    y, x = (state.gripper // vlm_model.PATCH).astype(int).T
    around = truth["first"].reshape(4, 12, 12)
    for b in range(4):
        near = around[b, max(0, y[b] - 2) : y[b] + 3, max(0, x[b] - 2) : x[b] + 3]
        assert near.max() == 2
    assert set(truth["first"].unique().tolist()) == {0.0, 1.0, 2.0}
    assert ((truth["kind"] == train_vla.KINDS - 1) == ~truth["owned"]).all()


def test_packed_instructions_equal_single_turns():
    """Each gets the logits that it gets alone behind the picture, from the stock forward."""
    net = untrained()
    tables, state = manipulation.sample(4, range(2))
    asked = train_vla.ask(tables, state)
    pixels = vlm_model.pixels(manipulation.render(tables, state)[0])
    with torch.no_grad():
        patches = net.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        together, states = train_vla.read(net, net.model.multi_modal_projector(patches), asked.ids, None)
        assert states[-1].shape == (2, 4 * train_vla.SEGMENT, vlm_model.DIM)
        for q in range(4):
            prompt = torch.cat([torch.ones(2, 1, dtype=torch.long), torch.full((2, 144), 4), asked.ids[:, q]], dim=1)
            alone = net(input_ids=prompt, pixel_values=pixels).logits[:, 145:]
            assert (together[:, q] - alone).abs().max() < 1e-4


def test_kept_tokens_keep_their_positions():
    net = untrained()
    tables, state = manipulation.sample(4, range(2))
    ids, features = train_vla.ask(tables, state).ids, torch.randn(2, 144, vlm_model.DIM)
    with torch.no_grad():
        whole, _ = train_vla.read(net, features, ids, None)
        same, _ = train_vla.read(net, features, ids, torch.arange(144).expand(2, -1))
        half, _ = train_vla.read(net, features, ids, torch.arange(0, 144, 2).expand(2, -1))
    assert (whole - same).abs().max() < 1e-5
    assert (whole - half).abs().max() > 1e-4


def test_training_runs_all_stages_aggregates_and_resumes(tmp_path, monkeypatch):
    recipe = train_vla.VlaRecipe(**SHORT, aggregate_every=2)
    monkeypatch.setattr(
        manipulation, "rollout", lambda *a, _full=manipulation.rollout, **k: _full(*a, **(k | {"horizon": 3}))
    )
    straight = train_vla.train(recipe, tmp_path / "a")
    rows = training.logged(tmp_path / "a")
    assert rows[-1]["step"] == 6 and rows[-1]["stage"] == "drop"
    assert [r["step"] for r in rows if "aggregated" in r] == [4]
    assert {"x", "y", "grip", "x_dropped", "aim", "see"} <= set(rows[-1])

    class Stop(Exception):
        pass

    losses = train_vla._losses

    def stop(*args):
        if args[-1] == 5:
            raise Stop
        return losses(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_vla, "_losses", stop)
        patch.setattr(train_vla, "CHECKPOINT_EVERY", 1)
        with pytest.raises(Stop):
            train_vla.train(recipe, tmp_path / "b")
    resumed = train_vla.train(recipe, tmp_path / "b")
    for (name, one), (_, two) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6), name


def test_training_learns_something(tmp_path):
    """A dozen steps on the tower's task: the loss falls well below its start."""
    recipe = train_vla.VlaRecipe(see_steps=14, read_steps=0, join_steps=0, drop_steps=0, batch=4, warmup=4)
    first = train_vla._losses(
        recipe, vla_model.model(tiny.data_folder() / "tiny-vlm"), train_vla.Heads(),
        train_vla.examples(recipe, 0, train_vla.Visited(1)), "see", 0,
    )[1]["see"]  # fmt: skip
    net = train_vla.train(recipe, tmp_path)
    assert not net.training
    assert training.logged(tmp_path)[-1]["loss"] < 0.9 * first


def test_the_dropping_batches_teach_the_tower_nothing():
    recipe = train_vla.VlaRecipe(**SHORT)
    net, heads, visited = vla_model.model(), train_vla.Heads(), train_vla.Visited(1)
    for step, learns in ((4, True), (5, False)):
        net.zero_grad(set_to_none=True)
        batch = train_vla.examples(recipe, step, visited)
        train_vla._losses(recipe, net, heads, batch, "drop", step)[0].backward()
        weight = net.model.vision_tower.encoder.layers[0].mlp.fc1.weight
        assert (weight.grad is not None) == learns
        assert net.model.multi_modal_projector.linear_1.weight.grad is not None


@pytest.fixture(scope="module")
def embedded():
    if not DATA.is_dir():
        pytest.skip("data/tiny-vla is not there")
    return tiny.vla()


def test_committed_folder(embedded):
    export.verify(DATA)
    assert sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file()) <= export.LIMIT
    gate = json.loads((DATA / "gate.json").read_text())
    assert f"## Gate: {'passed' if gate['passed'] else 'missed'}" in (DATA / "README.md").read_text()
    assert type(embedded[0]).__name__ == "LlavaForConditionalGeneration"
    assert type(embedded[1]).__name__ == "LlavaProcessor"


def test_committed_policy_acts(embedded):
    """12 fresh episodes: as few successes as these have a chance above 1 in 1000 at the card's rate."""
    from math import comb

    model, _ = embedded
    rate = json.loads((DATA / "gate.json").read_text())["dense"]["success"]
    went = manipulation.rollout(vla_model.policy(model), *manipulation.sample(manipulation.HELDOUT_SEED, range(12)))
    won = int(went.success.sum())
    assert sum(comb(12, k) * rate**k * (1 - rate) ** (12 - k) for k in range(won + 1)) > 1e-3


def test_policy_reads_what_the_processor_makes(embedded):
    model, processor = embedded
    tables, state = manipulation.sample(5, range(3))
    images, _ = manipulation.render(tables, state)
    texts = ["<image>" + text for text in tables.instructions()]
    batch = processor(text=texts, images=[picture(x) for x in images], return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]
    said = processor.batch_decode(out, skip_special_tokens=True)
    assert [manipulation.read_action(t) for t in said] == [
        tuple(a) for a in vla_model.policy(model)(images, tables.instructions())
    ]
    assert all(len(text.split()) == 3 for text in said)  # the end mark follows the third word
