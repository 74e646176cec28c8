"""What Qwen's hosts owe beyond `host_checks`: where tokens lie, what their encoder saw, prompts that were shortened before."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import mmeff
from mmeff.pruning import FastV
from mmeff.pruning._base import Decision, LayerView

from . import host_checks as checks
from .small_qwen_vl import IMAGE, TIME, VIDEO, WORDS, SmallQwen


def look(model: Any, inputs: dict[str, Any], see: Any, *, needs: frozenset[str] = frozenset(), **search: Any) -> Any:
    """What `see` makes of the view at layer 0, which keeps everything; under generate() if there are search arguments."""
    found = []

    @dataclass(frozen=True, kw_only=True)
    class Probe(checks.EveryThird):
        def decide(self, view: LayerView) -> Decision:
            found.append(see(view))
            return Decision(view.present)

    Probe.needs = needs  # type: ignore[assignment]
    with mmeff.accelerate(model, Probe(schedule="0:1.0")):
        if search:
            checks.generate(model, inputs, max_new_tokens=1, **search)
        else:
            model(**inputs, logits_to_keep=1, use_cache=True)
    return found[0]


def places_are_right(family: SmallQwen, **search: Any) -> None:
    """Frames, rows and columns equal those that the items say, also for beams; text is what stands behind all pictures."""
    view = look(family.model(), family.prompts(), lambda v: v, **search)
    n = search.get("num_beams", 1)
    for b, row in enumerate(family.where()):
        for twin in range(n * b, n * b + n):
            mine = view.present[twin]
            assert int(mine.sum()) == len(row)
            found = torch.cat([view.frame[twin, mine][:, None], view.place[twin, mine]], dim=1)
            assert found.tolist() == [list(at) for at in row]
            rasters = {f: [at for at in row if at[0] == f] for f, _, _ in row}
            assert view.raster[twin, mine].tolist() == [rasters[at[0]].index(at) for at in row]
            ids = view.text_ids()[twin, view.text[twin]].tolist()
            last = family.prompts()["input_ids"][b]
            assert ids == last[int(family.visual(None, family.prompts())[b].nonzero().max()) + 1 :].tolist()
            assert TIME not in ids


class Spy:
    """Runs a vision tower with attention that keeps what it computes: per layer, a list of (weights, keys) of its pieces."""

    def __init__(self, model: Any) -> None:
        from transformers import AttentionInterface

        self.tower = model.model.visual
        self.layers: list[list[Any]] = [[] for _ in self.tower.blocks]
        AttentionInterface.register("spy", self.attend)
        self.tower.set_attn_implementation("spy")

    def attend(self, module: Any, q: Any, k: Any, v: Any, scaling: float, **kwargs: Any) -> Any:
        weights = (q @ k.transpose(2, 3) * scaling).softmax(-1)
        index = next(i for i, block in enumerate(self.tower.blocks) if block.attn is module)
        self.layers[index].append((weights[0].mean(0).sum(0), k[0].mean(0)))
        return (weights @ v).transpose(1, 2), weights


def reference_encoding(family: SmallQwen, inputs: dict[str, Any], layer: int) -> dict[str, list[torch.Tensor]]:
    """Per row of the prompt, by visual token in its order: attention received, keys, and projected features."""
    from transformers.vision_utils import get_vision_window_index

    model = family.model()
    by_token: dict[str, dict[int, torch.Tensor]] = {"received": {}, "keys": {}, "projected": {}}
    vision = model.config.vision_config
    for token, kind, name in ((IMAGE, "image", "pixel_values"), (VIDEO, "video", "pixel_values_videos")):
        if name not in inputs:
            continue
        spy, grid = Spy(model), inputs[f"{kind}_grid_thw"]
        features = getattr(model.model, f"get_{kind}_features")(inputs[name], grid, return_dict=True).pooler_output
        weights, keys = (torch.cat(parts) for parts in zip(*spy.layers[layer], strict=True))
        tokens = len(weights) // 4
        back = torch.arange(tokens)
        if hasattr(vision, "window_size"):
            back = get_vision_window_index(grid, 2, vision.window_size, vision.patch_size)[0].argsort()
        area = torch.cat([torch.full((int(g.prod()) // 4,), int(g[1] * g[2])) for g in grid])
        by_token["received"][token] = weights.view(tokens, 4).mean(1)[back] / area
        by_token["keys"][token] = keys.view(tokens, 4, -1).mean(1)[back]
        by_token["projected"][token] = torch.cat(features)
    rows: dict[str, list[torch.Tensor]] = {}
    for what, parts in by_token.items():
        at = dict.fromkeys(parts, 0)
        rows[what] = []
        for ids in inputs["input_ids"].tolist():
            mine = []
            for token in ids:
                if token in parts:
                    mine.append(parts[token][at[token]])
                    at[token] += 1
            rows[what].append(torch.stack(mine))
    return rows


def encoder_is_what_ran(family: SmallQwen, layer: int, **search: Any) -> None:
    """Attention, keys and features of the tower, token by token, equal what the tower itself computed."""

    def see(view: LayerView) -> Any:
        eyes = view.encoder()
        with pytest.raises(ValueError, match="no class token"):
            eyes.received(layer, "class")
        projected = eyes.project(eyes.features())
        return {
            "received": eyes.received(layer, "all"), "keys": eyes.keys(layer - eyes.layers), "projected": projected,
            "entered": view.embeddings(), "present": view.present,
        }  # fmt: skip

    inputs = family.prompts()
    seen = look(family.model(), inputs, see, needs=frozenset({"encoder", "projector"}), **search)
    expected = reference_encoding(family, inputs, layer)
    n = search.get("num_beams", 1)
    for b in range(len(inputs["input_ids"]) * n):
        mine = seen["present"][b]
        for what in ("received", "keys", "projected"):
            assert (seen[what][b, mine] - expected[what][b // n]).abs().max() < 1e-5, what
            assert not seen[what][b, ~mine].any()
        assert (seen["entered"][b, mine] - expected["projected"][b // n]).abs().max() < 1e-5
    assert expected["received"][0].std() > 0.1 * expected["received"][0].mean(), (
        "attention is uniform: nothing was tested"
    )


def second_turn(family: SmallQwen) -> None:
    """Text after a pruned prompt: nothing is pruned again, the dropped columns stay hidden, positions go on."""
    model, reference = family.model(), family.model(attention="eager")
    inputs = family.prompts()
    rows = len(inputs["input_ids"])
    with mmeff.accelerate(model, FastV(schedule="1:0.6,3:0.3")) as handle:
        first = checks.generate(model, inputs)
        visual = family.visual(model, inputs)
        hidden = {k: checks.dropped_columns(visual, kept) for k, kept in handle.report().kept.items()}
        more = torch.randint(8, WORDS, (rows, 4), generator=torch.Generator().manual_seed(9))
        turn = {
            "input_ids": torch.cat([first.sequences, more], dim=1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(rows, 9, dtype=torch.long)], dim=1),
        }
        fast = checks.generate(model, turn, past_key_values=copy.deepcopy(first.past_key_values))
    with checks.MaskedReference(checks.language(reference).layers, hidden):
        before = checks.generate(reference, inputs)
        checks.assert_same_run(first, before)
        checks.assert_same_run(fast, checks.generate(reference, turn, past_key_values=before.past_key_values))


def second_picture(kind: str) -> None:
    """A further turn with a picture of its own: its tokens alone are chosen, found by their positions, for the grids are those
    of both turns; those dropped before stay hidden."""
    family = SmallQwen(kind, [[(2,), (10, 6), (3,)], [(1,), (4, 2), (5,)]])
    more = SmallQwen(kind, [[(4,), (6, 4), (5,)], [(4,), (4, 8), (3,)]])
    model, reference = family.model(), family.model(attention="eager")
    inputs = family.prompts()

    def turn(said: torch.Tensor) -> dict[str, Any]:
        """The first turn and one more; the padding of the shorter of the new turns lies between a row's two."""
        new = more.prompts()
        ids, grid = torch.cat([said, new["input_ids"]], dim=1), new["image_grid_thw"]
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long), new["attention_mask"]], dim=1)
        encoded = model.model.get_image_features(new["pixel_values"], grid, return_dict=True)
        grids = torch.stack([inputs["image_grid_thw"], grid], dim=1).flatten(0, 1)  # row by row
        return {
            "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE).int(), "image_grid_thw": grids,
            "mm_encoder_outputs": {"image": encoded},
        }  # fmt: skip

    method = FastV(schedule="1:0.6,3:0.3")
    with mmeff.accelerate(model, method) as handle:
        first = checks.generate(model, inputs)
        before = {
            k: checks.dropped_columns(family.visual(None, inputs), kept) for k, kept in handle.report().kept.items()
        }
        again = turn(first.sequences)
        chunk = {
            "input_ids": torch.where(
                torch.arange(again["input_ids"].shape[1]) < first.sequences.shape[1], 0, again["input_ids"]
            )
        }
        fast = checks.generate(model, again, past_key_values=first.past_key_values)
        kept = handle.report().kept
    assert {k: x.shape[1] for k, x in kept.items()} == {1: 5, 3: 2}  # of 8 and 6 tokens
    hidden = {k: checks.dropped_columns(family.visual(None, chunk), x) for k, x in kept.items()}
    for k, columns in before.items():
        hidden[k][:, : columns.shape[1]] |= columns
    with checks.MaskedReference(checks.language(reference).layers, before):
        slow = checks.generate(reference, inputs)
    with checks.MaskedReference(checks.language(reference).layers, hidden):
        checks.assert_same_run(
            fast, checks.generate(reference, turn(slow.sequences), past_key_values=slow.past_key_values)
        )


def by_hand(kind: str) -> None:
    """A loop that hands the model one token and a cache goes on at the right M-RoPE position."""
    family = SmallQwen(kind, [[(2,), (10, 6), (3,), (3, 4, 6), (3,)]])
    model, inputs = family.model(), family.prompts()
    with mmeff.accelerate(model, checks.EveryThird(schedule="0:0.5")):
        whole = checks.generate(model, inputs)
        out = model(**inputs, logits_to_keep=1, use_cache=True)
        for said, expected in zip(whole.sequences[0, -5:], whole.logits, strict=True):
            assert (out.logits[:, -1] - expected).abs().max() < 1e-5
            out = model(input_ids=said.view(1, 1), past_key_values=out.past_key_values, use_cache=True)


def processor_prompt(kind: str) -> None:
    """What the family's own processor makes of pictures and a video is pruned as prompts made by hand are."""
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor
    from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl import Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
    from transformers.video_utils import VideoMetadata

    special = ["<pad>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = {w: i for i, w in enumerate([*special, "what", "is", "this", "<", ">", "seconds", *"0123456789."])}
    core = Tokenizer(models.WordLevel(words, unk_token="this"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(True)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", additional_special_tokens=special[1:], padding_side="left"
    )
    sizes = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 4096}}
    made, eyes = (
        (Qwen3VLProcessor, Qwen3VLVideoProcessor)
        if kind == "qwen3_vl"
        else (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor)
    )
    processor = made(
        Qwen2VLImageProcessor(**sizes), tokenizer, eyes(**sizes, do_sample_frames=False, cap_pixels_per_frame=False)
    )
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 255, (h, w, 3), dtype=np.uint8) for h, w in ((40, 24), (18, 33))]
    video = draw.integers(0, 255, (5, 16, 24, 3), dtype=np.uint8)
    picture, film = ("<|vision_start|>" + pad + "<|vision_end|>" for pad in special[3:])
    inputs = dict(processor(
        text=[f"what is {picture} this {picture}", f"is {film if kind != 'qwen3_vl' else '<|video_pad|>'} this is this what"],
        images=images, videos=[video], video_metadata=[VideoMetadata(total_num_frames=5, fps=2.0, frames_indices=list(range(5)))],
        padding=True, return_tensors="pt",
    ))  # fmt: skip
    inputs.pop("video_metadata", None)
    family = SmallQwen(kind, [[(1,), (10, 6), (4, 8)], [(1,), (3, 4, 6), (1,)]])
    family.prompts = lambda: inputs  # type: ignore[method-assign]
    checks.equals_masked_reference(family, FastV(schedule="1:0.6,3:0.2"))
    view = look(family.model(), inputs, lambda v: v, num_beams=2)
    for b, row in enumerate(family.where()):
        mine = view.present[2 * b]
        assert torch.cat([view.frame[2 * b, mine][:, None], view.place[2 * b, mine]], dim=1).tolist() == [
            list(at) for at in row
        ]


def shortened(family: SmallQwen, kept: torch.Tensor) -> dict[str, Any]:
    """The prompt without the visual tokens that are not in `kept`: shorter ids, features that are ready, original positions."""
    model, inputs = family.model(), family.prompts()
    visual = family.visual(model, inputs)
    stays = inputs["attention_mask"].bool() & ~checks.dropped_columns(visual, kept)
    grids = {k: v for k, v in inputs.items() if k.endswith(("thw", "ts"))}
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], attention_mask=inputs["attention_mask"], **grids
    )
    encoded = {}
    for token, kind, name in ((IMAGE, "image", "pixel_values"), (VIDEO, "video", "pixel_values_videos")):
        if name in inputs:
            out = getattr(model.model, f"get_{kind}_features")(
                inputs[name], inputs[f"{kind}_grid_thw"], return_dict=True
            )
            of_kind = stays[inputs["input_ids"] == token]
            pieces = [len(x) for x in out.pooler_output]

            def cut(features: Any, of_kind: Any = of_kind, pieces: Any = pieces) -> Any:
                parts = zip(torch.cat(list(features)).split(pieces), of_kind.split(pieces), strict=True)
                return [x[keep] for x, keep in parts]

            out.pooler_output = cut(out.pooler_output)
            if getattr(out, "deepstack_features", None) is not None:
                out.deepstack_features = [cut(level) for level in out.deepstack_features]
            encoded[kind] = out
    size = int(stays.sum(1).max())
    ids, mask = (torch.zeros(len(stays), size, dtype=torch.long) for _ in range(2))
    where = torch.zeros(3, len(stays), size, dtype=torch.long)
    for b, row in enumerate(stays):
        n = int(row.sum())
        ids[b, size - n :], mask[b, size - n :] = inputs["input_ids"][b, row], 1
        where[:, b, size - n :] = positions[:, b, row]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": where, "mm_encoder_outputs": encoded}


def shortened_prompt_equals_pruning_at_layer_0(family: SmallQwen) -> None:
    """A prompt of kept tokens alone, at their original positions, is the same run; and it can be pruned in its turn, for its
    tokens are found by their positions."""
    model, inputs = family.model(), family.prompts()
    with mmeff.accelerate(model, checks.EveryThird(schedule="0:0.5")) as handle:
        fast = checks.generate(model, inputs)
        kept = handle.report().kept[0]
    short = checks.generate(model, shortened(family, kept))
    assert torch.equal(fast.sequences[:, -5:], short.sequences[:, -5:])
    for a, b in zip(fast.logits, short.logits, strict=True):
        assert (a - b).abs().max() < 1e-5

    view = look(model, shortened(family, kept), lambda v: v)
    again = look(model, shortened(family, kept), lambda v: v, num_beams=2)
    for b, row in enumerate(family.where()):
        mine = view.present[b]
        expected = [row[k] for k in kept[b].tolist() if k >= 0]
        frames = sorted({f for f, _, _ in expected})
        found = torch.cat([view.frame[b, mine][:, None], view.place[b, mine]], dim=1).tolist()
        assert found == [[frames.index(f), y, x] for f, y, x in expected]
        assert torch.equal(again.frame[2 * b], view.frame[b])
        assert torch.equal(again.place[2 * b + 1], view.place[b])


def places_that_cannot_be_told(family: SmallQwen) -> None:
    """Ready features, no grids, plain positions: an error that names what is missing."""
    short = shortened(family, torch.arange(2).expand(len(family.items), -1))
    del short["position_ids"]
    with pytest.raises(ValueError, match="pass the grids and mm_token_type_ids"):
        look(family.model(), short, lambda v: v)


def encoder_needs_pixels(family: SmallQwen) -> None:
    short = shortened(family, torch.arange(2).expand(len(family.items), -1))
    with pytest.raises(ValueError, match="pass pixel values"):
        look(family.model(), short, lambda v: v.encoder(), needs=frozenset({"encoder"}))


def plan_counts_what_runs(kind: str) -> None:
    """The dry run and the report agree, for an image of a size that is no multiple of a token's and for a video of odd length."""
    for items, sizes in (
        ([[(1,), (10, 6), (4,)]], {"height": 41, "width": 23}),
        ([[(1,), (3, 4, 6), (4,)]], {"frames": 5, "height": 16, "width": 24}),
    ):
        family = SmallQwen(kind, items)
        model = family.model()
        plan = mmeff.plan(model, FastV(layer=2, keep=0.3), **sizes)
        with mmeff.accelerate(model, FastV(layer=2, keep=0.3)) as handle:
            checks.generate(model, family.prompts())
            report = handle.report()
        assert dict(plan.rows)["visual tokens"].split()[0] == f"{report.tokens['visual tokens per prompt']:.0f}"
        assert dict(plan.rows)["kept"] == f"{report.kept[2].shape[1]} from layer 2 on"
    assert "assumed" in dict(mmeff.plan(model, FastV()).rows)["visual tokens"]
