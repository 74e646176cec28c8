"""What hosts of tiles and of frames owe beyond `host_checks`: where each token lies, what the encoder says of it, features that
are passed in ready-made, prompts that were shortened before, a further turn with a picture, loops by hand.

A small family lays the tokens of its rows out by hand, one by one, with the patches that each is made of.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch

import mmeff
from mmeff.pruning import FastV
from mmeff.pruning._base import Decision, LayerView

from . import host_checks as checks

WORDS = 48
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class Cell(NamedTuple):
    """One visual token: its frame in the row, its place there, and its patches, counted over all that the encoder sees."""

    frame: int
    row: int
    column: int
    patches: list[int]


class Tiled:
    """A small family; `rows` are prompts of numbers (words) and of pictures as the family names them."""

    visual_ids: ClassVar[tuple[int, ...]]
    rows: Any

    def __init__(self, rows: list[list[Any]] | None = None) -> None:
        if rows is not None:
            self.rows = rows

    # ---- what a family says

    def model(self, *, attention: str = "sdpa", seed: int = 0) -> Any:
        raise NotImplementedError

    def make(self, rows: list[list[Any]]) -> dict[str, torch.Tensor]:
        """The inputs of a batch; words and pixels depend on the row alone, not on the batch it is in."""
        raise NotImplementedError

    def cells(self, rows: list[list[Any]] | None = None) -> list[list[Cell]]:
        """The visual tokens of each row, in order."""
        raise NotImplementedError

    def tower(self, model: Any) -> Any:
        raise NotImplementedError

    def attentions(self, model: Any) -> list[Any]:
        """The attention modules of the tower's layers."""
        raise NotImplementedError

    # ---- what follows from it

    @staticmethod
    def text() -> dict[str, Any]:
        return {
            "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
        }  # fmt: skip

    @staticmethod
    def draw(row: list[Any]) -> torch.Generator:
        numbers = [n for item in row for n in ([item] if isinstance(item, int) else item[1:])]
        return torch.Generator().manual_seed(sum(n * 7**i for i, n in enumerate(numbers)))

    def prompts(self) -> dict[str, torch.Tensor]:
        return self.make(self.rows)

    def row(self, inputs: dict[str, torch.Tensor], b: int) -> dict[str, torch.Tensor]:
        return self.make([self.rows[b]])

    def visual(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.isin(inputs["input_ids"], torch.tensor(self.visual_ids))


def words(count: int, draw: torch.Generator) -> list[int]:
    found: list[int] = torch.randint(10, WORDS, (count,), generator=draw).tolist()
    return found


def collate(texts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Left-padded ids and mask."""
    size = max(map(len, texts))
    return {
        "input_ids": torch.tensor([[0] * (size - len(t)) + t for t in texts]),
        "attention_mask": torch.tensor([[0] * (size - len(t)) + [1] * len(t) for t in texts]),
    }


def loud(model: Any, attention: str) -> Any:
    """The default weights leave attention almost uniform: every selection would look alike."""
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "embed" not in name:
                p.mul_(30.0 if "vision" in name and (".q_proj" in name or ".k_proj" in name) else 6.0)
            elif p.ndim == 4:
                p.mul_(20.0)
            elif p.ndim == 3:  # a class token and positions, which start as zeros
                p.normal_()
        model.get_input_embeddings().weight.normal_(std=1.0)
    model.set_attn_implementation(attention)
    return model


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


# ---- the checks


def places_are_right(family: Tiled, inputs: dict[str, Any] | None = None, **search: Any) -> None:
    """Frames, rows and columns equal those laid out by hand, also for beams; text is what stands behind all pictures."""
    inputs = family.prompts() if inputs is None else inputs
    view = look(family.model(), inputs, lambda v: v, **search)
    n = search.get("num_beams", 1)
    assert len(view.present) == n * len(family.rows)
    for b, row in enumerate(family.cells()):
        last = int(family.visual(None, inputs)[b].nonzero().max())
        for twin in range(n * b, n * b + n):
            mine = view.present[twin]
            found = torch.cat([view.frame[twin, mine][:, None], view.place[twin, mine]], dim=1)
            assert found.tolist() == [[c.frame, c.row, c.column] for c in row]
            frames = [c.frame for c in row]
            assert view.raster[twin, mine].tolist() == [frames[:i].count(f) for i, f in enumerate(frames)]
            assert view.text_ids()[twin, view.text[twin]].tolist() == inputs["input_ids"][b, last + 1 :].tolist()


class Spy:
    """Runs a tower with attention that keeps what it computes: per layer, for each piece that attends among itself, mean
    weights (queries, keys) and mean keys (keys, D). `final` are the states that leave the tower, before any packing."""

    def __init__(self, family: Tiled, model: Any) -> None:
        from transformers import AttentionInterface

        self.modules = family.attentions(model)
        self.layers: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self.modules]
        AttentionInterface.register("tower_spy", self.attend)
        tower = family.tower(model)
        tower.set_attn_implementation("tower_spy")
        self.final: list[torch.Tensor] = []
        norm = getattr(tower, "post_layernorm", None) or tower.layernorm
        norm.register_forward_hook(lambda module, args, out: self.final.append(out))

    def attend(self, module: Any, q: Any, k: Any, v: Any, *args: Any, scaling: float, **kwargs: Any) -> Any:
        weights = (q @ k.transpose(2, 3) * scaling).softmax(-1)
        self.layers[self.modules.index(module)] += zip(weights.mean(1), k.mean(1), strict=True)
        return (weights @ v).transpose(1, 2), weights


def encode(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Features of all pictures and videos, as a user makes them."""
    found = {}
    for kind, pixels in PIXELS.items():
        if pixels in inputs:
            function = getattr(model.model, f"get_{kind}_features")
            given = {k: inputs[k] for k in inspect.signature(function).parameters if k in inputs}
            found[kind] = function(**given, return_dict=True)
    return found


def streams(inputs: dict[str, Any], encoded: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Features per kind, (tokens in the prompt, D)."""
    found = {}
    for kind, output in encoded.items():
        features = torch.cat([x.reshape(-1, x.shape[-1]) for x in output.pooler_output])
        found[kind] = features[inputs["video_compression_mask"]] if kind == "video" else features
    return found


def encoder_is_what_ran(family: Tiled, layer: int, *, class_token: bool = False, **search: Any) -> None:
    """Attention, keys and features by token are means over its patches of what the tower itself computes."""

    def see(view: LayerView) -> Any:
        eyes = view.encoder()
        found = {
            "all": eyes.received(layer, "all"),
            "keys": eyes.keys(layer - eyes.layers),
            "features": eyes.features(),
        }
        if class_token:
            found["class"] = eyes.received(layer, "class")
        else:
            with pytest.raises(ValueError, match="no class token"):
                eyes.received(layer, "class")
        found |= {"projected": eyes.project(eyes.features()), "entered": view.embeddings(), "present": view.present}
        return found

    needs = {"encoder", "projector", *(["class token"] if class_token else [])}
    inputs, n = family.prompts(), search.get("num_beams", 1)
    seen = look(family.model(), inputs, see, needs=frozenset(needs), **search)
    model = family.model()
    spy, first = Spy(family, model), int(class_token)
    features = streams(inputs, encode(model, inputs))
    weights, keys = zip(*spy.layers[layer], strict=True)
    by_patch = {
        "all": torch.cat([w.mean(0)[first:] for w in weights])[:, None],
        "class": torch.cat([w[0, first:] for w in weights])[:, None],
        "keys": torch.cat([k[first:] for k in keys]),
        "features": torch.cat([x[..., first:, :].reshape(-1, x.shape[-1]) for x in spy.final]),
    }
    seen["features"] = seen["features"].unflatten(-1, (-1, by_patch["features"].shape[1])).mean(-2)
    at = dict.fromkeys(features, 0)
    for b, row in enumerate(family.cells()):
        expected = {what: torch.stack([x[c.patches].mean(0) for c in row]) for what, x in by_patch.items()}
        projected = []
        for token in inputs["input_ids"][b].tolist():
            if token in family.visual_ids:
                kind = ("image", "video")[family.visual_ids.index(token)]
                projected.append(features[kind][at[kind]])
                at[kind] += 1
        expected |= {"projected": torch.stack(projected), "entered": torch.stack(projected)}
        for twin in range(n * b, n * b + n):
            mine = seen["present"][twin]
            assert int(mine.sum()) == len(row)
            for what, right in expected.items():
                if what == "class" and not class_token:
                    continue
                got = seen[what][twin, mine].view(len(row), -1)
                assert (got - right).abs().max() < 1e-5 * right.abs().max().clamp(min=1), what
                assert not seen[what][twin, ~mine].any() or what == "projected"  # a projector's bias
                apart = (right[1:] - right[:-1]).abs().amax(dim=1)
                assert apart.median() > 1e-3 * right.abs().max(), f"{what} of neighbours are alike: nothing was tested"
    assert at == {kind: len(x) for kind, x in features.items()}


def shortened(family: Tiled, kept: torch.Tensor) -> dict[str, Any]:
    """The prompt without the visual tokens that are not in `kept`: shorter ids, features that are ready, original positions."""
    model, inputs = family.model(), family.prompts()
    stays = inputs["attention_mask"].bool() & ~checks.dropped_columns(family.visual(model, inputs), kept)
    encoded = encode(model, inputs)
    for kind, features in streams(inputs, encoded).items():
        token = family.visual_ids[("image", "video").index(kind)]
        left = features[stays[inputs["input_ids"] == token]]
        tensor = torch.is_tensor(encoded[kind].pooler_output)
        encoded[kind].pooler_output = left[None] if tensor else [left]
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    size = int(stays.sum(1).max())
    found = {
        name: torch.zeros(len(stays), size, dtype=torch.long)
        for name in ("input_ids", "attention_mask", "position_ids")
    }
    for b, row in enumerate(stays):
        n = int(row.sum())
        found["input_ids"][b, size - n :], found["attention_mask"][b, size - n :] = inputs["input_ids"][b, row], 1
        found["position_ids"][b, size - n :] = positions[b, row]
    return {**found, "mm_encoder_outputs": encoded}


def shortened_prompt_equals_pruning_at_layer_0(family: Tiled) -> None:
    """A stock model on the kept tokens alone, at their original positions, computes what pruning before layer 0 does."""
    model = family.model()
    with mmeff.accelerate(model, checks.EveryThird(schedule="0:0.4")) as handle:
        fast = checks.generate(model, family.prompts())
        kept = handle.report().kept[0]
    short = checks.generate(model, shortened(family, kept))
    assert torch.equal(fast.sequences[:, -5:], short.sequences[:, -5:])
    for a, b in zip(fast.logits, short.logits, strict=True):
        assert (a - b).abs().max() < 1e-5


def places_that_cannot_be_told(family: Tiled, match: str) -> None:
    """Of tokens that were dropped by hand: an error, and never the places of others."""
    with pytest.raises(ValueError, match=match):
        look(family.model(), shortened(family, torch.arange(4).expand(len(family.rows), -1)), lambda v: v, num_beams=1)


def features_passed_in_equal_pixels(family: Tiled, *, beams: int) -> None:
    """With the features in place of the pixels the same tokens are kept, and the same text is generated."""
    model, inputs = family.model(), family.prompts()
    with mmeff.accelerate(model, checks.EveryThird(schedule="1:0.5", quota="frame")) as handle:
        pixels = checks.generate(model, inputs, num_beams=beams)
        kept = handle.report().kept[1]
        ready = {k: v for k, v in inputs.items() if k not in PIXELS.values()}
        checks.assert_same_run(
            checks.generate(model, {**ready, "mm_encoder_outputs": encode(model, inputs)}, num_beams=beams), pixels
        )
        assert torch.equal(handle.report().kept[1], kept)
    with pytest.raises(ValueError, match="pass pixel values"):
        look(
            model,
            {**ready, "mm_encoder_outputs": encode(model, inputs)},
            lambda v: v.encoder(),
            needs=frozenset({"encoder"}),
            num_beams=beams,
        )


def second_turn_with_a_picture(family: Tiled, more: Tiled) -> None:
    """Its tokens alone are chosen; those dropped before stay hidden. The shorter turns are padded in the middle."""
    model, reference = family.model(), family.model(attention="eager")
    inputs, new, rows = family.prompts(), more.prompts(), len(family.rows)

    def turn(said: torch.Tensor) -> dict[str, Any]:
        mask = torch.cat(
            [inputs["attention_mask"], torch.ones(rows, 5, dtype=torch.long), new["attention_mask"]], dim=1
        )
        return {**new, "input_ids": torch.cat([said, new["input_ids"]], dim=1), "attention_mask": mask}

    method = FastV(schedule="1:0.6,3:0.3")
    with mmeff.accelerate(model, method) as handle:
        first = checks.generate(model, inputs)
        before = {
            k: checks.dropped_columns(family.visual(None, inputs), kept) for k, kept in handle.report().kept.items()
        }
        length = first.sequences.shape[1]
        fast = checks.generate(model, turn(first.sequences), past_key_values=first.past_key_values)
        kept = handle.report().kept
    counts = [len(row) for row in more.cells()]
    assert {k: (x >= 0).sum(1).tolist() for k, x in kept.items()} == {
        point.layer: [point.count(n) for n in counts] for point in method.points(5)
    }
    visual = torch.nn.functional.pad(family.visual(None, new), (length, 0))
    hidden = {k: checks.dropped_columns(visual, x) for k, x in kept.items()}
    for k, columns in before.items():
        hidden[k][:, : columns.shape[1]] |= columns
    with checks.MaskedReference(checks.language(reference).layers, before):
        slow = checks.generate(reference, inputs)
    with checks.MaskedReference(checks.language(reference).layers, hidden):
        checks.assert_same_run(
            fast, checks.generate(reference, turn(slow.sequences), past_key_values=slow.past_key_values)
        )


def by_hand(family: Tiled) -> None:
    """A loop that hands the model one token and a cache goes on at the right position."""
    model, inputs = family.model(), family.row(family.prompts(), 0)
    with mmeff.accelerate(model, checks.EveryThird(schedule="0:0.5")):
        whole = checks.generate(model, inputs)
        out = model(**inputs, logits_to_keep=1, use_cache=True)
        for said, expected in zip(whole.sequences[0, -5:], whole.logits, strict=True):
            assert (out.logits[:, -1] - expected).abs().max() < 1e-5
            out = model(input_ids=said.view(1, 1), past_key_values=out.past_key_values, use_cache=True)


def plan_counts_what_runs(family: Tiled, inputs: dict[str, Any], **sizes: int) -> str:
    """The dry run and the report agree."""
    model, method = family.model(), checks.EveryThird(schedule="1:0.5,3:0.2")
    said = dict(mmeff.plan(model, method, **sizes).rows)
    with mmeff.accelerate(model, method) as handle:
        checks.generate(model, inputs)
        tokens = handle.report().tokens
    assert float(said["visual tokens"].split()[0]) == tokens["visual tokens per prompt"]
    assert float(said["mean over layers"]) == tokens["mean over layers"]
    for layer in (1, 3):
        assert f"{tokens[f'kept from layer {layer} on']:.0f} from layer {layer} on" in said["kept"]
    return said["visual tokens"]


def tokenizer(**special: str) -> Any:
    """One id per word w10, w11, ... and per special token, of which `special` names some."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", *special.values()]
    core = Tokenizer(
        models.WordLevel(
            {w: i for i, w in enumerate([*names, *(f"w{i}" for i in range(len(names), WORDS))])}, unk_token="w47"
        )
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", padding_side="left", extra_special_tokens=special
    )
