"""Training CaCoVID: the frozen model's answers under masks, learning in the right direction, resuming, and what is written."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmeff import training
from mmeff.errors import UnsupportedModel
from mmeff.pipelines import train_cacovid as module
from mmeff.pipelines.train_cacovid import CaCoVIDRecipe, TwoRates, cosine, learn, train_cacovid
from mmeff.pipelines.train_cacovid_prompts import (
    QuestionList,
    VideoQuestion,
    language_model,
    masked_likelihood,
    read_prompt,
)
from mmeff.pruning import CaCoVID
from mmeff.pruning._cacovid_policy import Policy

FRAMES, SIZE = 3, 16
SHORT = CaCoVIDRecipe.small(
    questions=4, updates=2, token_masks=5, frame_masks=3, held_out_every=2, checkpoint_every=1, warmup=0, seed=3
)


def _pruning_tools():
    """The tiny random LLaVA of the pruning tests."""
    path = Path(__file__).parents[1] / "pruning" / "conftest.py"
    spec = importlib.util.spec_from_file_location("pruning_conftest", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


TOOLS = _pruning_tools()


@pytest.fixture(scope="module")
def llava():
    return TOOLS.random_llava()


def question(seed, *, text=5, answer=(7, 9, 11)):
    inputs = TOOLS.prompts([text], images=[FRAMES], seed=seed)
    return VideoQuestion(inputs, torch.tensor(answer), FRAMES)


@pytest.fixture
def questions():
    return QuestionList([question(i, answer=(5 + i, 6, 7)) for i in range(5)], held_out=2, name="random")


def random_masks(count, kept, seed=0):
    draw = torch.Generator().manual_seed(seed)
    order = torch.rand(count, FRAMES * SIZE, generator=draw).argsort(1)[:, :kept]
    return torch.zeros(count, FRAMES * SIZE, dtype=torch.bool).scatter_(1, order, True).view(count, FRAMES, SIZE)


# -------------------------------------------------------------------- the frozen model


def full_length(llava, asked, mask=None):
    """Log-probabilities (A, vocabulary) of the answer's places: the stock model at full length, dropped columns hidden."""
    prompt, answer = asked.inputs, asked.answer
    ids = torch.cat([prompt["input_ids"], answer[None]], dim=1)
    inputs = {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    dropped = torch.zeros(1, ids.shape[1], dtype=torch.bool)
    if mask is not None:
        dropped[0, (ids[0] == TOOLS.IMAGE).nonzero()[:, 0][~mask.flatten()]] = True
    llava.set_attn_implementation("eager")
    with TOOLS.MaskedReference(llava, {0: dropped}), torch.no_grad():
        logits = llava(**inputs).logits[0]
    llava.set_attn_implementation("sdpa")
    return logits[-len(answer) - 1 : -1].log_softmax(-1)


def test_likelihoods_are_those_of_the_full_model_with_columns_hidden(llava):
    asked = question(0)
    prompt = read_prompt(llava, asked)
    masks = random_masks(6, 11)
    found, exact = masked_likelihood(llava, prompt.embeds, prompt.positions, prompt.columns(masks), asked.answer)
    for mask, value, right in zip(masks, found, exact, strict=True):
        reference = full_length(llava, asked, mask)
        assert float(value) == pytest.approx(float(reference[range(3), asked.answer].mean()), abs=1e-4)
        assert bool(right) == bool((reference.argmax(-1) == asked.answer).all())
    assert found.std() > 1e-3
    parts = masked_likelihood(llava, prompt.embeds, prompt.positions, prompt.columns(masks), asked.answer, at_once=4)
    torch.testing.assert_close(parts[0], found, atol=1e-5, rtol=1e-5)
    shifted = masked_likelihood(llava, prompt.embeds, prompt.positions * 2, prompt.columns(masks), asked.answer)[0]
    assert not torch.allclose(shifted, found, atol=1e-3)  # positions matter


def test_exact_is_what_greedy_decoding_answers(llava):
    asked = question(1)
    wanted = llava.generate(**asked.inputs, max_new_tokens=3, do_sample=False)[0, -3:]
    prompt = read_prompt(llava, asked)
    everything = prompt.columns(torch.ones(1, FRAMES, SIZE, dtype=torch.bool))
    assert masked_likelihood(llava, prompt.embeds, prompt.positions, everything, wanted)[1].tolist() == [True]
    other = torch.tensor([*wanted[:2].tolist(), (int(wanted[2]) + 1) % 48])
    assert masked_likelihood(llava, prompt.embeds, prompt.positions, everything, other)[1].tolist() == [False]


def test_masks_of_one_call_keep_equally_many(llava):
    prompt = read_prompt(llava, question(0))
    uneven = torch.cat([random_masks(1, 5), random_masks(1, 6)])
    with pytest.raises(ValueError, match="masks must keep equally many tokens, got between 11 and 12"):
        masked_likelihood(llava, prompt.embeds, prompt.positions, prompt.columns(uneven), torch.tensor([3]))


def test_a_prompt_is_what_enters_the_first_layer(llava):
    asked = question(0)
    prompt = read_prompt(llava, asked)
    caught = {}
    hook = (
        language_model(llava)
        .layers[0]
        .register_forward_pre_hook(
            lambda m, args, kwargs: caught.update(x=args[0], rotary=kwargs["position_embeddings"]), with_kwargs=True
        )
    )
    with torch.no_grad():
        llava(**asked.inputs)
    hook.remove()
    torch.testing.assert_close(prompt.embeds, caught["x"][0])
    for ours, theirs in zip(prompt.rotary, caught["rotary"], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert prompt.slots.tolist() == [list(range(1 + SIZE * f, 1 + SIZE * f + SIZE)) for f in range(FRAMES)]
    assert not language_model(llava)._forward_pre_hooks


def test_the_newline_behind_a_onevision_video_always_stays():
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            image_size=32, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        ),
        text_config=Qwen2Config(
            vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
        ),
        video_token_id=4, image_token_id=3,
    )  # fmt: skip
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, *[4] * (2 * 4 + 1), 9, 10]])  # 4 x 4 patches of a frame are pooled to 2 x 2
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(1, 2, 3, 32, 32),
    }
    prompt = read_prompt(model, VideoQuestion(inputs, torch.tensor([5, 6]), 2))
    assert prompt.slots.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    columns = prompt.columns(torch.zeros(1, 2, 4, dtype=torch.bool))[0]
    assert columns.nonzero()[:, 0].tolist() == [0, 9, 10, 11]
    assert Policy.from_layer(model.model.language_model.layers[0], model.config.text_config).config.qkv_bias


def test_prompts_that_cannot_be_trained_on(llava):
    asked = question(0)
    with pytest.raises(
        ValueError, match="video tokens of a prompt must divide into its frames, got 48 tokens and 5 frames"
    ):
        read_prompt(llava, asked._replace(frames=5))
    with pytest.raises(ValueError, match="one prompt without padding"):
        read_prompt(llava, asked._replace(inputs=TOOLS.prompts([4, 5], images=[FRAMES, FRAMES])))
    padded = {**asked.inputs, "attention_mask": asked.inputs["attention_mask"].clone()}
    padded["attention_mask"][0, 0] = 0
    with pytest.raises(ValueError, match="one prompt without padding"):
        read_prompt(llava, asked._replace(inputs=padded))
    with pytest.raises(ValueError, match="at least one"):
        read_prompt(llava, asked._replace(answer=torch.tensor([], dtype=torch.long)))
    with pytest.raises(UnsupportedModel, match=r"with model\.language_model, got Linear"):
        read_prompt(torch.nn.Linear(2, 2), asked)
    hook = language_model(llava).register_forward_pre_hook(
        lambda m, args, kwargs: (args, {**kwargs, "position_ids": torch.zeros(3, 1, 54, dtype=torch.long)}),
        with_kwargs=True,
    )
    try:
        with pytest.raises(UnsupportedModel, match="one position per token"):
            read_prompt(llava, asked)
    finally:
        hook.remove()


# -------------------------------------------------------------------- learning


def fresh_policy(llava, seed=0):
    torch.manual_seed(seed)
    return Policy.from_layer(language_model(llava).layers[0], language_model(llava).config)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_reward_is_learned(llava, sign):
    """A reward of its own likes some tokens and one frame; within 50 questions the policy ranks them first, or last."""
    prompt = read_prompt(llava, question(0))
    liked = torch.zeros(FRAMES, SIZE)
    liked[:, [1, 5, 12]] = 1.0
    liked[2] += 0.5
    recipe = CaCoVIDRecipe.small(questions=50, updates=2, lr=3e-3, token_masks=16, frame_masks=6, alpha=0.19, warmup=5)
    policy = fresh_policy(llava)
    optimizer = TwoRates(policy, recipe)

    def judge(masks):
        return sign * (masks * liked).sum((1, 2)), torch.full((len(masks),), 0.5)

    @torch.no_grad()
    def standing():
        tokens, frames = prompt.logits(policy)
        favourites = tokens[:, [1, 5, 12]].mean() - tokens.mean()
        return float(favourites), float(frames[2] - frames[:2].mean())

    for step in range(recipe.questions):
        figures = learn(policy, optimizer, prompt, judge, recipe, step)
    token, frame = standing()
    assert sign * token > 0.5
    assert sign * frame > 0.5
    assert {"content_reward", "token_reward", "frame_reward", "loss", "norm", "lr", "alpha"} <= set(figures)
    if sign > 0:
        assert set(prompt.logits(policy)[0].topk(3).indices.flatten().tolist()) >= {1, 5, 12}


def test_the_models_own_likelihood_is_learned(llava):
    """On one question, over and over: the greedy masks become better than any mask was at first on the mean."""
    asked = question(0)
    prompt = read_prompt(llava, asked)
    recipe = CaCoVIDRecipe.small(questions=40, updates=3, lr=3e-3, warmup=5, alpha=0.19)
    policy = fresh_policy(llava)
    optimizer, judge = TwoRates(policy, recipe), module._judge(llava, prompt, asked, recipe)
    rows = [learn(policy, optimizer, prompt, judge, recipe, step) for step in range(16)]
    assert rows[-1]["token_reward"] > 1.03 * rows[0]["token_reward"]
    assert rows[-1]["best_token_reward"] > max(rows[0]["token_reward"], rows[0]["content_reward"])


def test_a_reward_without_preferences_moves_nothing(llava):
    prompt = read_prompt(llava, question(0))
    recipe = replace(SHORT, weight_decay=0.0)
    policy = fresh_policy(llava)
    before = prompt.logits(policy)[0].detach()
    figures = learn(policy, TwoRates(policy, recipe), prompt, lambda m: (torch.ones(len(m)),) * 2, recipe, 0)
    assert figures["norm"] < 1e-6
    torch.testing.assert_close(prompt.logits(policy)[0].detach(), before)
    with pytest.raises(ValueError, match="rewards must be finite"):
        learn(policy, TwoRates(policy, recipe), prompt, lambda m: (torch.full((len(m),), float("nan")),) * 2, recipe, 0)


def test_difficulty_changes_how_much_is_kept(llava):
    prompt = read_prompt(llava, question(0))
    recipe = replace(SHORT, updates=3, alpha=0.125, alpha_floor=0.06, alpha_cap=0.25)
    kept = {}
    for right in (0.0, 0.5, 1.0):
        policy, kept[right] = fresh_policy(llava), []

        def judge(masks, right=right):
            kept[right].append(masks.sum((1, 2)).unique().tolist())
            return torch.rand(len(masks)), torch.full((len(masks),), right)

        learn(policy, TwoRates(policy, recipe), prompt, judge, recipe, 0)
    assert kept == {
        0.0: [[6], [12], [12]],
        0.5: [[6], [6], [6]],
        1.0: [[6], [3], [3]],
    }


def test_masks_are_drawn_from_the_policy_before_the_first_update(llava, monkeypatch):
    prompt = read_prompt(llava, question(0))
    drawn = {"token_masks": [], "frame_masks": []}
    for name, calls in drawn.items():
        original = getattr(module.rl, name)

        def spy(logits, *args, original=original, calls=calls):
            calls.append(logits.clone())
            return original(logits, *args)

        monkeypatch.setattr(module.rl, name, spy)
    policy = fresh_policy(llava)

    def judge(masks):
        return masks[:, :, 0].sum(1).float(), torch.full((len(masks),), 0.5)

    learn(policy, TwoRates(policy, SHORT), prompt, judge, replace(SHORT, updates=3), 0)
    with torch.no_grad():
        now = prompt.logits(policy)
    for calls, after in zip(drawn.values(), now, strict=True):
        assert len(calls) == 3
        assert torch.equal(calls[0], calls[1])
        assert torch.equal(calls[0], calls[2])
        assert not torch.equal(calls[0], after)


def test_the_layer_learns_slower_than_the_heads(llava):
    policy = fresh_policy(llava)
    optimizer = TwoRates(policy, replace(SHORT, layer_lr=0.1, weight_decay=0.0))
    before = {k: v.detach().clone() for k, v in policy.named_parameters()}
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(1e-2, clip=1e9)
    moved = {k: float((v.detach() - before[k]).abs().max()) for k, v in policy.named_parameters()}
    assert moved["token_head.0.weight"] == pytest.approx(1e-2, rel=1e-3)
    assert moved["norm.weight"] == pytest.approx(1e-2, rel=1e-3)
    assert moved["layer.mlp.up_proj.weight"] == pytest.approx(1e-3, rel=1e-2)


def test_cosine():
    values = [cosine(s, steps=110, lr=2.0, warmup=10) for s in (0, 9, 10, 60, 110)]
    assert values == pytest.approx([0.2, 2.0, 2.0, 1.0, 0.0])


# -------------------------------------------------------------------- the run


class Interrupted(Exception):
    pass


def test_a_run_writes_a_policy_that_loads_and_leaves_the_model_alone(llava, questions, tmp_path, monkeypatch):
    before = {k: v.clone() for k, v in llava.state_dict().items()}
    llava.train()
    done = train_cacovid(llava, questions, SHORT, tmp_path / "work", out=tmp_path / "policy")
    assert llava.training
    llava.eval()
    assert all(torch.equal(v, before[k]) for k, v in llava.state_dict().items())
    assert all(p.grad is None for p in llava.parameters())
    assert {p.name for p in done.folder.iterdir()} == {
        "config.json", "policy.safetensors", "log.jsonl", "curve.png", "README.md", "training.json",
    }  # fmt: skip
    assert [step for step, _ in done.held_out] == [0, 2, 4]
    state = CaCoVID(policy=str(done.folder)).new_state()
    run = training.Run(tmp_path / "work", json.loads((tmp_path / "work" / "config.json").read_text())).load()
    assert run is not None
    for name, value in state.state_dict().items():
        assert torch.equal(value, run[0][f"policy.{name}"]), name
    fresh = module.held_out_figures(llava, state, questions.held_out(), SHORT)
    assert fresh["held_out"] == pytest.approx(done.figure("held_out"), rel=1e-5)
    card = (done.folder / "README.md").read_text()
    assert f"{done.figure('held_out'):.4f}" in card
    assert f"{done.figure('even'):.4f}" in card
    summary = json.loads((done.folder / "training.json").read_text())
    assert summary["recipe"] == SHORT.to_dict()
    assert (done.folder / "curve.png").read_bytes()[:4] == b"\x89PNG"
    rows = [json.loads(line) for line in (done.folder / "log.jsonl").read_text().splitlines()]
    assert any("token_reward" in r for r in rows)
    with pytest.raises(ValueError, match="holds a run with other values of lr"):
        train_cacovid(llava, questions, replace(SHORT, lr=1.0), tmp_path / "work")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="holds something else than a trained policy"):
        train_cacovid(llava, questions, SHORT, tmp_path / "new", out=tmp_path / "other")
    monkeypatch.setattr(questions, "_held_out", [])
    with pytest.raises(ValueError, match="held-out questions, got none"):
        train_cacovid(llava, questions, SHORT, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_run_resumes_to_the_same_policy(llava, questions, tmp_path):
    straight = train_cacovid(llava, questions, SHORT, tmp_path / "a")

    def progress(step, steps, row):
        if step == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_cacovid(llava, questions, SHORT, tmp_path / "b", progress=progress)
    resumed = train_cacovid(llava, questions, SHORT, tmp_path / "b")
    one, two = (Policy.load(done.folder).state_dict() for done in (straight, resumed))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=0, msg=name)
    other = train_cacovid(llava, questions, replace(SHORT, seed=4), tmp_path / "c")
    assert not torch.equal(Policy.load(other.folder).state_dict()["norm.weight"], one["norm.weight"])


def test_held_out_figures_are_of_the_masks_they_name(llava, questions):
    recipe = replace(SHORT, held_out_keep=1.0)
    everything = module.baselines(llava, questions.held_out(), recipe)
    assert everything["even"] == pytest.approx(everything["all"], rel=1e-5)
    policy = fresh_policy(llava)
    assert module.held_out_figures(llava, policy, questions.held_out(), recipe)["held_out"] == pytest.approx(
        everything["all"], rel=1e-5
    )
    found = [full_length(llava, q)[range(3), q.answer].mean().exp() for q in questions.held_out()]
    assert everything["all"] == pytest.approx(float(sum(found)) / 2, rel=1e-3)
    few = module.baselines(llava, questions.held_out(), replace(SHORT, held_out_keep=0.1))
    assert few["even"] != pytest.approx(few["all"], rel=1e-2)


@pytest.mark.parametrize("reward", ["likelihood", "exact"])
def test_rewards(llava, reward):
    asked = question(0)
    prompt = read_prompt(llava, asked)
    masks = random_masks(4, 9)
    rewards, right = module._judge(llava, prompt, asked, replace(SHORT, reward=reward, masks_at_once=3))(masks)
    likelihood, exact = masked_likelihood(llava, prompt.embeds, prompt.positions, prompt.columns(masks), asked.answer)
    wanted = (likelihood, likelihood.exp()) if reward == "likelihood" else (exact.float(), exact.float())
    torch.testing.assert_close(rewards, wanted[0])
    torch.testing.assert_close(right, wanted[1])


def test_questions_of_an_epoch_come_once_each(questions):
    seen = [[int(questions.training(1, step).answer[0]) for step in range(e * 3, e * 3 + 3)] for e in range(4)]
    assert all(sorted(epoch) == [5, 6, 7] for epoch in seen)
    assert len({tuple(epoch) for epoch in seen}) > 1
    assert [int(q.answer[0]) for q in questions.held_out()] == [8, 9]
    with pytest.raises(ValueError, match=r"held_out must be in \[1, 1\] for 2 questions, got 2"):
        QuestionList([question(0), question(1)], held_out=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reward": "rouge"}, "reward must be 'likelihood' or 'exact', got 'rouge'"),
        ({"questions": 0}, "questions must be an int >= 1, got 0"),
        ({"token_masks": 1}, "token_masks must be an int >= 2, got 1"),
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\], got 0\.0"),
        ({"frames_kept": 1.5}, r"frames_kept must be in \(0, 1\], got 1\.5"),
        ({"clip_low": 1.0}, r"clip_low must be in \(0, 1\), got 1\.0"),
        ({"lr": 0.0}, "lr must be finite and > 0"),
        ({"kl": -1.0}, "kl must be finite and >= 0"),
    ],
)
def test_recipes_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        CaCoVIDRecipe(**fields)


def test_the_default_recipe_is_the_published_one():
    recipe = CaCoVIDRecipe()
    assert (recipe.token_masks, recipe.frame_masks, recipe.updates, recipe.alpha) == (23, 8, 5, 0.02)
    assert (recipe.lr, recipe.layer_lr, recipe.weight_decay, recipe.clip) == (1e-6, 0.1, 0.01, 5.0)
    assert (recipe.clip_low, recipe.clip_high, recipe.seed) == (0.2, 0.28, 42)
