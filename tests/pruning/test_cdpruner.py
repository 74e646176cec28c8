"""CDPruner: the greedy choice against determinants, relevance against plain Python, CLIP against its own model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmeff.pruning import CDPruner
from mmeff.pruning._select import cosines
from mmeff.pruning.cdpruner import greedy_map

from .input_scene import Scene, by_frame, cosine, kept

SCENE = Scene(dim=16)


def unit_range(x):
    low, high = min(x), max(x)
    return [(v - low + 1e-6) / (high - low) for v in x] if high > low else [1.0] * len(x)


def by_words(b, places):
    words = SCENE.words[b]
    return [sum(cosine(SCENE.embedded[b][p], w) for w in words) / len(words) for p in places]


def by_determinants(b, places, count, relevance=by_words, scene=SCENE):
    """Each pick makes the determinant of the kernel of all picked ones as large as it can be."""
    r = unit_range(relevance(b, places)) if relevance else [1.0] * len(places)
    x = [scene.embedded[b][p] for p in places]
    likeness = [[cosine(a, b) if a is not b else 1.0 for b in x] for a in x]
    kernel = np.array(likeness) * np.outer(r, r)
    picked = []
    for _ in range(count):
        left = [i for i in range(len(x)) if i not in picked]
        value = [np.linalg.slogdet(kernel[np.ix_([*picked, i], [*picked, i])])[1] for i in left]
        picked.append(left[value.index(max(value))])
    return sorted(picked)


@pytest.mark.parametrize("keep", [0.5, 0.3, 4, 1, 1.0])
@pytest.mark.parametrize(("relevance", "oracle"), [("embeddings", by_words), ("none", None)])
def test_each_pick_makes_the_largest_determinant(relevance, oracle, keep):
    view = SCENE.view(keep=keep)
    for b, found in enumerate(kept(CDPruner(relevance=relevance), view)):
        assert found == by_determinants(b, list(range(SCENE.visual[b])), int(view.counts[b]), oracle)


def test_relevance_counts():
    view = SCENE.view(keep=0.5)
    assert kept(CDPruner(), view) != kept(CDPruner(relevance="none"), view)
    opposite = [by_determinants(b, list(range(n)), int(view.counts[b]), lambda b, p: [-x for x in by_words(b, p)])
                for b, n in enumerate(SCENE.visual)]  # fmt: skip
    assert kept(CDPruner(), view) != opposite


def test_frames_are_problems_of_their_own():
    view = SCENE.view(keep=0.4)
    for b, found in enumerate(kept(CDPruner(quota="frame"), view)):
        assert found == by_frame(
            lambda places, k, b=b: by_determinants(b, places, k), int(view.counts[b]), SCENE.frame[b]
        )


@pytest.mark.parametrize("quota", ["prompt", "frame"])
def test_a_row_keeps_the_same_alone(quota):
    method = CDPruner(quota=quota)
    batch = kept(method, SCENE.view(keep=0.5))
    assert [kept(method, SCENE.view([b], keep=0.5))[0] for b in range(3)] == batch


def test_without_text_only_diversity_counts():
    silent = Scene(dim=16, texts=(4, 6, 0))
    silent.embedded = SCENE.embedded
    assert kept(CDPruner(), silent.view(keep=0.5))[2] == kept(CDPruner(relevance="none"), silent.view(keep=0.5))[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_beyond_the_rank_the_most_relevant_follow(dtype):
    """Three dimensions hold three independent tokens; rounding errors must not choose the others."""
    draw = torch.Generator().manual_seed(1)
    x = torch.nn.functional.normalize(torch.randn(1, 40, 3, generator=draw, dtype=torch.float64), dim=-1)
    r = torch.rand(1, 40, generator=draw, dtype=torch.float64) + 0.1
    kernel = (r[:, :, None] * (x @ x.transpose(1, 2)) * r[:, None, :]).to(dtype)
    present = torch.ones(1, 40, dtype=torch.bool)
    three = greedy_map(kernel, torch.tensor([3]), present)[0].nonzero()[:, 0].tolist()
    many = set(greedy_map(kernel, torch.tensor([12]), present)[0].nonzero()[:, 0].tolist())
    others = [i for i in r[0].argsort(descending=True).tolist() if i not in three]
    assert many == {*three, *others[:9]}


def test_many_picks_agree_with_float64():
    """Rounding stays small over hundreds of picks."""
    kernel = cosines(torch.randn(1, 300, 256, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    counts, present = torch.tensor([150]), torch.ones(1, 300, dtype=torch.bool)
    exact, rounded = (greedy_map(k, counts, present) for k in (kernel, kernel.float()))
    assert (exact & rounded).sum() >= 148


def test_broken_tokens_go_last():
    scene = Scene(dim=16)
    scene.embedded[0][:6] = math.nan
    for relevance in ("embeddings", "none"):
        assert kept(CDPruner(relevance=relevance), scene.view([0], keep=7)) == [list(range(6, 13))]
        assert kept(CDPruner(relevance=relevance), scene.view([0], keep=8)) == [[0, *range(6, 13)]]


# ---- CLIP


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Folders of a small random CLIP with 8 text places, and of a tokenizer whose ids are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    names = ["cat", "dog", "left", "red", "blue", "a", "is", "where"]
    torch.manual_seed(0)
    sizes = {"hidden_size": 5 * 2, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **sizes,
        "vocab_size": 12,
        "max_position_embeddings": 8,
        "bos_token_id": 8,
        "eos_token_id": 9,
        "pad_token_id": 10,
    }
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 8, "patch_size": 4}, projection_dim=6)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.7)
    folders = tmp_path_factory.mktemp("clip"), tmp_path_factory.mktemp("words")
    model.save_pretrained(folders[0])
    for folder, special in zip(folders, (("<s>", "</s>", "<pad>"), ("<s>", "</s>", "<pad>")), strict=True):
        vocabulary = {w: i for i, w in enumerate([*names, *special, "?"])}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        words.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 8), ("</s>", 9)]
        )
        PreTrainedTokenizerFast(
            tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="?"
        ).save_pretrained(folder)
    return model.eval(), str(folders[0]), str(folders[1])


def clip_scene():
    scene = Scene(wide=10, dim=16, texts=(4, 15, 3))
    scene.ids = [torch.tensor([1, 0, 8, 3]), torch.arange(15) % 8, torch.tensor([7, 6, 2])]  # 8 is special: no word
    return scene


def by_clip(model, scene, b):
    """Minus the mean cosine of each patch to every piece of six words, in plain torch on a row of its own."""
    words = [i for i in scene.ids[b].tolist() if i < 8]
    with torch.no_grad():
        images = model.visual_projection(model.vision_model.post_layernorm(scene.features[b].float()))
        texts = []
        for start in range(0, len(words), 6):
            ids = torch.tensor([[8, *words[start : start + 6], 9]])
            texts.append(model.text_projection(model.text_model(ids).pooler_output)[0])
    return [-sum(cosine(image, text) for text in texts) / len(texts) for image in images]


@pytest.mark.parametrize("rows", [[0, 1, 2], [1], [2]])
def test_clip_reads_the_prompt(clip, rows):
    model, folder, words = clip
    method = CDPruner(relevance="clip", clip=folder, tokenizer=words)
    scene = clip_scene()
    view = scene.view(rows, keep=0.5, state=method.new_state())
    found = kept(method, view)
    for i, b in enumerate(rows):
        n = scene.visual[b]
        measured = by_clip(model, scene, b)
        torch.testing.assert_close(
            method.measure(view, view.embeddings())[i, :n].tolist(), measured, rtol=1e-4, atol=1e-5
        )
        relevance = lambda b, places, measured=measured: [measured[p] for p in places]  # noqa: E731
        assert found[i] == by_determinants(b, list(range(n)), int(view.counts[i]), relevance, scene)
    assert len(set(map(tuple, found))) == len(rows)


def test_clip_of_another_tower_is_refused(clip):
    _, folder, words = clip
    method = CDPruner(relevance="clip", clip=folder, tokenizer=words)
    with pytest.raises(ValueError, match=r"CDPruner.clip must name .* has features of width 10, the tower of width 5"):
        method.decide(SCENE.view(state=method.new_state()))


def test_installations_load_for_themselves(clip):
    _, folder, words = clip
    method = CDPruner(relevance="clip", clip=folder, tokenizer=words)
    assert method.new_state() is not method.new_state()
    assert CDPruner().new_state() is None


def test_fields_and_budget():
    assert CDPruner.needs == CDPruner().needs == frozenset()
    assert CDPruner(relevance="clip", clip="a", tokenizer="b").needs == {"encoder", "projector", "text ids"}
    with pytest.raises(
        ValueError, match=r'CDPruner.clip must be a folder or hub name for relevance="clip", got \'\'; or pass'
    ):
        CDPruner(relevance="clip", tokenizer="b")
    with pytest.raises(ValueError, match=r"CDPruner.tokenizer must be a folder or hub name"):
        CDPruner(relevance="clip", clip="a")
    with pytest.raises(ValueError, match=r'CDPruner.clip must be empty for relevance="embeddings", got \'a\'; pass'):
        CDPruner(clip="a")
    assert CDPruner(keep=64).at_budget(0.5, 8).points(8)[0].keep == 0.5
