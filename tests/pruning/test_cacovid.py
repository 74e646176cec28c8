"""CaCoVID's quotas and picks against loops over the published steps, its policy against transformers' own layers."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmeff.pruning import CaCoVID
from mmeff.pruning._cacovid_policy import Policy, PolicyConfig
from mmeff.pruning.cacovid import choose, frame_quotas, settle, spread
from mmeff.registry import build

from .fake_view import FakeView, prompt_masks

SIZES = PolicyConfig(
    hidden_size=32, intermediate_size=48, heads=4, kv_heads=2, head_dim=8, eps=1e-6, trained_on="a model of the tests"
)


def random_policy(sizes=SIZES, *, seed=0):
    torch.manual_seed(seed)
    policy = Policy(sizes)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return policy


# -------------------------------------------------------------------- the oracle: one row, loops, the steps as published


def expected_quotas(logits, sizes, count, importance, cap):
    """Steps a and b for one row; `sizes` of its frames. Python floats and ints only."""
    t, n = len(sizes), sum(sizes)
    top = max(abs(f) for f in logits)
    e = [math.exp(3 * f / top) for f in logits]
    p = [min(max(x / sum(e), 1 / (2 * t)), cap / t) for x in e]
    p = [x / sum(p) for x in p]
    budget, goal = round(importance * count), math.floor(importance * count + 1e-9)
    quotas = []
    for share, size in zip(p, sizes, strict=True):
        most = math.floor(importance * size * cap * count / n + 1e-9)
        quotas.append(min(max(round(share * budget), 1), most, size))
    while sum(quotas) > goal:
        quotas[quotas.index(max(quotas))] -= 1
    while sum(quotas) < goal:
        room = [q if q < size else math.inf for q, size in zip(quotas, sizes, strict=True)]
        quotas[room.index(min(room))] += 1
    return quotas


def expected_kept(tokens, logits, frame, count, importance, cap):
    """Steps a to d for one row without padding: indices that stay."""
    members = [[i for i, f in enumerate(frame) if f == g] for g in range(max(frame) + 1)]
    quotas = expected_quotas(logits, [len(m) for m in members], count, importance, cap)
    kept = set()
    for member, quota in zip(members, quotas, strict=True):
        kept.update(sorted(member, key=lambda i: (-tokens[i], i))[:quota])
    rest = [i for i in range(len(frame)) if i not in kept]
    missing = count - len(kept)
    for i in range(missing):
        kept.add(rest[math.floor(i * (len(rest) - 1) / max(1, missing - 1) + 0.5)])
    return kept


def rows_of(draw, rows):
    """Random rows: frame of each token, sizes of frames."""
    found = []
    for _ in range(rows):
        sizes = [draw.randint(3, 9) for _ in range(draw.randint(1, 6))]
        found.append([g for g, size in enumerate(sizes) for _ in range(size)])
    return found


@pytest.mark.parametrize(("importance", "cap"), [(0.5, 1.5), (0.29, 1.0), (1.0, 2.5), (0.75, 4.0)])
def test_kept_tokens_are_those_of_the_published_steps(importance, cap):
    draw = random.Random(5)
    for trial in range(25):
        rows = rows_of(draw, 4)
        width, groups = max(map(len, rows)), max(r[-1] + 1 for r in rows)
        torch.manual_seed(trial)
        tokens = torch.randn(4, width, dtype=torch.float64)
        frames = 2 * torch.randn(4, groups, dtype=torch.float64)
        counts = [max(1, round(draw.random() * len(r))) for r in rows]
        present = torch.tensor([[i < len(r) for i in range(width)] for r in rows])
        frame = torch.tensor([r + [groups + 3] * (width - len(r)) for r in rows])
        tokens[~present] = math.nan
        for b, r in enumerate(rows):
            frames[b, r[-1] + 1 :] = math.nan
        kept = choose(tokens, frames, frame, present, torch.tensor(counts), importance=importance, cap=cap)
        for b, r in enumerate(rows):
            wanted = expected_kept(tokens[b].tolist(), frames[b, : r[-1] + 1].tolist(), r, counts[b], importance, cap)
            assert set(kept[b].nonzero()[:, 0].tolist()) == wanted
            assert int(kept[b].sum()) == counts[b]


def test_the_oracle_can_fail():
    """Another cap, another share or another fill gives other tokens."""
    torch.manual_seed(0)
    frame = torch.arange(6).repeat_interleave(20)[None]
    tokens, frames = torch.randn(1, 120), 3 * torch.randn(1, 6)
    present, counts = torch.ones(1, 120, dtype=torch.bool), torch.tensor([40])
    kept = set(choose(tokens, frames, frame, present, counts, importance=0.5, cap=1.5)[0].nonzero()[:, 0].tolist())
    given = (tokens[0].tolist(), frames[0].tolist(), frame[0].tolist(), 40)
    assert kept == expected_kept(*given, 0.5, 1.5)
    assert kept != expected_kept(*given, 0.5, 1.1)
    assert kept != expected_kept(*given, 0.6, 1.5)


def test_quotas_of_the_published_setting():
    """32 frames of 196 tokens at 25%: 784 picks, at least 1 and at most 36 of them in a frame (spec of the evaluation)."""
    torch.manual_seed(1)
    logits = torch.randn(1, 32, dtype=torch.float64)
    quotas = frame_quotas(logits, torch.full((1, 32), 196), torch.tensor([1568]), importance=0.5, cap=1.5)
    assert quotas.sum() == 784
    assert quotas.max() <= 36
    assert quotas[0].tolist() == expected_quotas(logits[0].tolist(), [196] * 32, 1568, 0.5, 1.5)
    assert quotas[0, logits.argmax()] == quotas.max() > quotas.min() == quotas[0, logits.argmin()]


def test_settle_takes_single_steps():
    draw = random.Random(2)
    for _ in range(100):
        sizes = [draw.randint(0, 7) for _ in range(5)]
        quotas = [draw.randint(0, size) for size in sizes]
        goal = draw.randint(0, sum(sizes))
        wanted = list(quotas)
        while sum(wanted) > goal:
            wanted[wanted.index(max(wanted))] -= 1
        while sum(wanted) < goal:
            room = [q if q < size else 99 for q, size in zip(wanted, sizes, strict=True)]
            wanted[room.index(min(room))] += 1
        found = settle(torch.tensor([quotas]), torch.tensor([sizes]), torch.tensor([goal]))
        assert found[0].tolist() == wanted


def test_spread_is_a_rounded_line():
    for size in range(1, 25):
        for number in range(size + 1):
            gaps = torch.arange(2 * size) % 2 == 1  # every other entry is free
            found = spread(gaps[None], torch.tensor([number]))[0].nonzero()[:, 0].tolist()
            ranks = [math.floor(i * (size - 1) / max(1, number - 1) + 0.5) for i in range(number)]
            assert found == [2 * r + 1 for r in ranks]
            assert len(set(found)) == number


def test_equal_logits_keep_a_nearly_equal_share_of_each_frame():
    frame = torch.arange(4).repeat_interleave(9)[None]
    flat = torch.zeros(1, 36)
    kept = choose(
        flat, torch.zeros(1, 4), frame, torch.ones(1, 36, dtype=torch.bool), torch.tensor([16]), importance=0.5, cap=1.5
    )
    picks = [sum(int(kept[0, i]) for i in range(9 * g, 9 * g + 9)) for g in range(4)]
    assert sum(picks) == 16
    assert max(picks) - min(picks) <= 1
    assert kept[0, [0, 1, 9, 10, 18, 19, 27, 28]].all()  # ties go to the earlier token


# -------------------------------------------------------------------- the method on a view


def rotary(real, head_dim, dtype=torch.float64):
    places = (real.long().cumsum(1) - 1).clamp(min=0).to(dtype)
    angle = places[..., None] / 100 ** (torch.arange(head_dim // 2, dtype=dtype) / (head_dim // 2))
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def video_view(sizes, texts, *, policy, keep=0.5, seed=0, poison=True):
    """Rows of videos whose frames have the given sizes; padding holds NaN."""
    masks = prompt_masks([sum(s) for s in sizes], texts)
    torch.manual_seed(seed)
    embedded = torch.randn(*masks.real.shape, 32, dtype=torch.float64)
    if poison:
        embedded[~masks.real] = math.nan
    width = int(masks.visual.sum(1).max())
    frame = torch.tensor(
        [[g for g, n in enumerate(s) for _ in range(n)] + [0] * (width - sum(s)) for s in sizes], dtype=torch.long
    )
    return FakeView(
        visual=masks.visual, real=masks.real, embedded=embedded, frame=frame, keep=keep, layer=0, state=policy,
        rotary=rotary(masks.real, 8),
    )  # fmt: skip


def test_decisions_follow_the_policys_logits():
    policy = random_policy().double()
    sizes, texts = [[6, 6, 6], [9, 4], [5, 5, 5, 5, 5]], [4, 7, 2]
    view = video_view(sizes, texts, policy=policy)
    kept = CaCoVID().decide(view).keep
    assert CaCoVID().decide(view).hidden is None
    for b, row in enumerate(sizes):
        n = sum(row)
        at = view.visual[b].nonzero()[:, 0]
        x = view.inputs()[0][b][view.real[b]]
        cos, sin = (y[b][view.real[b]] for y in view.inputs()[2])
        out = policy.layer(x[None], torch.ones(1, len(x), dtype=torch.bool), cos[None], sin[None])[0]
        video = out[at - (~view.real[b]).sum()]
        tokens = policy.token_head(policy.norm(video)).diff(dim=-1)[:, 0]
        means = torch.stack([part.mean(0) for part in video.split(row)])
        frames = policy.frame_head(policy.norm(means)).diff(dim=-1)[:, 0]
        frame = [g for g, size in enumerate(row) for _ in range(size)]
        wanted = expected_kept(tokens.tolist(), frames.tolist(), frame, round(0.5 * n), 0.5, 1.5)
        assert set(kept[b].nonzero()[:, 0].tolist()) == wanted
        assert kept[b].sum() == view.counts[b]


def test_the_layer_sees_the_question_behind_the_video():
    policy = random_policy().double()
    view = video_view([[8, 8, 8]], [5], policy=policy)
    before = CaCoVID().decide(view).keep
    hidden, real, turned = view.inputs()
    frames, present = 3, view.present
    logits = policy(hidden, real, turned, view.slots(), present, view.frame, frames)
    hidden[0, -1] += 3.0
    changed = policy(hidden, real, turned, view.slots(), present, view.frame, frames)
    assert not torch.allclose(logits[0], changed[0])
    assert not torch.allclose(logits[1], changed[1])
    assert before.shape == (1, 24)


def test_a_row_alone_is_the_row_in_a_batch():
    policy = random_policy().double()
    sizes, texts = [[6, 6, 6], [9, 4], [5, 5, 5, 5, 5]], [4, 7, 2]
    view = video_view(sizes, texts, policy=policy)
    together = CaCoVID().decide(view).keep
    for b, row in enumerate(sizes):
        alone = video_view([row], [texts[b]], policy=policy)
        alone._embedded[0] = view._embedded[b][view.real[b]]
        assert CaCoVID().decide(alone).keep[0].tolist() == together[b, : sum(row)].tolist()
        assert not together[b, sum(row) :].any()


def test_half_precision_and_numbers_of_tokens():
    policy = random_policy()
    view = video_view([[6, 6, 6], [9, 4]], [4, 7], policy=policy, keep=5, poison=False)
    view._embedded = view._embedded.bfloat16()
    kept = CaCoVID(keep=5).decide(view).keep
    assert kept.sum(1).tolist() == [5, 5]


def test_state_is_read_from_a_folder(tmp_path):
    policy = random_policy()
    policy.save(tmp_path)
    method = CaCoVID(policy=str(tmp_path), keep=0.25)
    state = method.new_state()
    assert state is not method.new_state()
    for name, value in policy.state_dict().items():
        assert torch.equal(value, state.state_dict()[name]), name
    view = video_view([[8, 8]], [3], policy=state)
    other = video_view([[8, 8]], [3], policy=policy.double())
    assert torch.equal(method.decide(view).keep, method.decide(other).keep)


def test_it_needs_a_policy_that_fits(tmp_path):
    with pytest.raises(
        ValueError, match=r"CaCoVID needs a trained policy; train one with `mmeff train cacovid`, or pass pol"
    ):
        CaCoVID().new_state()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        CaCoVID(policy=str(tmp_path)).new_state()
    wide = Policy(replace(SIZES, hidden_size=48)).double()
    with pytest.raises(ValueError, match=r"has hidden size 48, trained on a model of the tests, and this model has 32"):
        CaCoVID(policy="p").decide(video_view([[8, 8]], [3], policy=wide))
    long = Policy(replace(SIZES, head_dim=16)).double()
    with pytest.raises(ValueError, match=r"has head dim 16, .* this model has 8"):
        CaCoVID(policy="p").decide(video_view([[8, 8]], [3], policy=long))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"importance": 0.0}, r"CaCoVID\.importance must be in \(0, 1\], got 0\.0"),
        ({"importance": 1.5}, r"CaCoVID\.importance must be in \(0, 1\], got 1\.5"),
        ({"cap": 0.5}, r"CaCoVID\.cap must be at least 1 equal share, got 0\.5"),
        ({"keep": 0.0}, r"CaCoVID\.keep must be a fraction in \(0, 1\]"),
        ({"quota": "frame"}, r"CaCoVID\.quota must be 'prompt', got 'frame'; its frame head"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        CaCoVID(**fields)


def test_budgets_are_fractions_of_every_layer():
    method = CaCoVID(policy="p").at_budget(0.1, layers=28)
    assert (method.keep, method.policy, method.points(28)[0].layer) == (0.1, "p", 0)
    assert build("cacovid", keep=64).points(28)[0].count(576) == 64
    assert CaCoVID.needs_training
    assert CaCoVID.needs == {"frames"}


# -------------------------------------------------------------------- the policy


def decoder_layer(family):
    """A random decoder layer of a family with its config, and its rotary embedding."""
    import transformers

    common = {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1,
        "vocab_size": 16, "attn_implementation": "eager",
    }  # fmt: skip
    more = {"Qwen3": {"head_dim": 16}, "Llama": {"attention_bias": True, "mlp_bias": True}}.get(family, {})
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**common, **more)
    model = getattr(transformers, f"{family}Model")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.layers[0], config, model.rotary_emb


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_a_copied_layer_computes_the_same_without_its_causal_mask(family):
    layer, config, turn = decoder_layer(family)
    policy = Policy.from_layer(layer, config, trained_on="x")
    assert policy.config.qk_norm == (family == "Qwen3")
    assert policy.config.qkv_bias == (family != "Qwen3")
    x = torch.randn(2, 11, 32)
    real = torch.ones(2, 11, dtype=torch.bool)
    real[1, :4] = False
    turned = turn(x, torch.arange(11)[None] + 5)
    blocked = torch.zeros(2, 1, 11, 11).masked_fill(~real[:, None, None], -math.inf)
    with torch.no_grad():
        wanted = layer(x, attention_mask=blocked, position_embeddings=turned)
        found = policy.layer(x, real, *turned)
        causal = layer(x, attention_mask=blocked + torch.full((11, 11), -math.inf).triu(1), position_embeddings=turned)
    torch.testing.assert_close(found[real], wanted[real], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0], causal[0], atol=1e-2)


@pytest.mark.parametrize("family", ["Gemma", "Gemma2", "Granite", "GPTNeoX"])
def test_layers_that_compute_something_else_are_refused(family):
    import transformers

    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, vocab_size=16,
        head_dim=8, attn_implementation="eager", **({"residual_multiplier": 0.5} if family == "Granite" else {}),
    )  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}Model")(config)
    with pytest.raises(ValueError, match=r"use a Llama, Qwen2 or Qwen3|made like Llama's"):
        Policy.from_layer(model.layers[0], config)


def test_a_folder_holds_what_was_saved(tmp_path):
    random_policy().save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "policy.safetensors"}
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored == {"kind": "cacovid-policy", **asdict(SIZES)}
    assert not Policy.load(tmp_path).training

    (tmp_path / "config.json").write_text(json.dumps({**stored, "heads": 2}))
    with pytest.raises(ValueError, match=r"does not fit config\.json: .* layer\.self_attn\.o_proj\.weight"):
        Policy.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**stored, "eps": "1"}))
    with pytest.raises(ValueError, match=r"PolicyConfig\.eps must be a positive float, got '1'"):
        Policy.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ValueError, match="is not the config of a CaCoVID policy"):
        Policy.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    tensors = load_file(tmp_path / "policy.safetensors")
    tensors.pop("norm.weight")
    save_file(tensors, tmp_path / "policy.safetensors")
    with pytest.raises(ValueError, match=r"does not fit config\.json: .* norm\.weight"):
        Policy.load(tmp_path)


def test_sizes_out_of_range():
    with pytest.raises(ValueError, match="hidden_size must be at least 16"):
        replace(SIZES, hidden_size=8)
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads=3, got 4"):
        replace(SIZES, kv_heads=3)
    with pytest.raises(ValueError, match="heads must be a positive int, got 0"):
        replace(SIZES, heads=0)


def test_fresh_heads_have_the_published_widths_and_small_logits():
    torch.manual_seed(0)
    policy = Policy(replace(SIZES, hidden_size=128))
    widths = [tuple(p.weight.shape) for p in policy.token_head if hasattr(p, "weight")]
    assert widths == [(64, 128), (32, 64), (16, 32), (8, 16), (2, 8)]
    logits = policy.token_head(torch.randn(500, 128)).diff(dim=-1)
    assert 1e-3 < logits.std() < 0.5
