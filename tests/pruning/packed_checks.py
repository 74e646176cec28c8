"""What hosts of packed pictures owe beyond `host_checks`: where each token lies, what the encoder says of it, and features that
are passed in ready-made."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import mmeff
from mmeff.pruning._base import Decision, LayerView, Need

from . import host_checks as checks
from .small_llava_next import Packed


def look(family: Packed, *, needs: set[Need], attention: str = "sdpa", beams: int = 1) -> tuple[Any, Any, Any]:
    """The model, its inputs, and what a method that looks at everything found before layer 0."""
    model, inputs, found = family.model(attention=attention), family.prompts(), {}
    asked = frozenset(needs)

    @dataclass(frozen=True, kw_only=True)
    class Probe(checks.EveryThird):
        needs: ClassVar[frozenset[Need]] = asked

        def decide(self, view: LayerView) -> Decision:
            found.update(
                present=view.present,
                frame=view.frame,
                place=view.place,
                raster=view.raster,
                embeddings=view.embeddings(),
            )
            if "encoder" in self.needs:
                eyes = view.encoder()
                found.update(features=eyes.features(), projected=eyes.project(eyes.features()), layers=eyes.layers)
                for layer in range(eyes.layers):
                    found["all", layer], found["keys", layer] = eyes.received(layer, "all"), eyes.keys(layer)
                    if "class token" in self.needs:
                        found["class", layer] = eyes.received(layer, "class")
            return Decision(view.present)

    with mmeff.accelerate(model, Probe()):
        if beams > 1:
            checks.generate(model, inputs, num_beams=beams, max_new_tokens=1)
        else:
            model(**inputs, logits_to_keep=1, use_cache=True)
    return model, inputs, found


def tokens_lie_where_they_are(family: Packed, *, beams: int = 1) -> None:
    _, inputs, found = look(family, needs=set(), beams=beams)
    assert len(found["present"]) == beams * len(inputs["input_ids"])
    for b, row in enumerate(family.table(inputs)):
        expected = [token for _, token in sorted(row.items()) if not token.marker]
        order = list(dict.fromkeys(token.frame for token in expected))
        for copy_of in range(b * beams, (b + 1) * beams):
            here = found["present"][copy_of]
            assert found["frame"][copy_of][here].tolist() == [order.index(t.frame) for t in expected]
            assert found["place"][copy_of][here].tolist() == [[t.row, t.column] for t in expected]
            before = [sum(t.frame == mine.frame for t in expected[:i]) for i, mine in enumerate(expected)]
            assert found["raster"][copy_of][here].tolist() == before


def encoder_signals_belong_to_their_tokens(family: Packed, *, class_token: bool, beams: int = 1) -> None:
    """Attention, keys and features per token equal means over that token's patches of what the tower itself computes."""
    needs: set[Need] = {"encoder", "projector"}
    model, inputs, found = look(family, needs=needs | {"class token"} if class_token else needs, beams=beams)
    tower = family.model(attention="eager").model.vision_tower
    pixels = pictures(family, inputs)
    keys: list[torch.Tensor] = []
    modules = [m for name, m in tower.named_modules() if name.endswith("k_proj")]
    hooks = [m.register_forward_hook(lambda module, args, out: keys.append(out)) for m in modules]
    seen = tower(pixels, output_attentions=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    first = int(class_token)
    for layer, matrix in enumerate(seen.attentions):
        mean = matrix.mean(dim=1)
        same(family, inputs, found["all", layer], mean[:, :, first:].mean(dim=1)[..., None], beams, found["present"])
        if class_token:
            same(family, inputs, found["class", layer], mean[:, 0, first:][..., None], beams, found["present"])
        heads = keys[layer].unflatten(-1, (matrix.shape[1], -1)).mean(dim=2)[:, first:]
        same(family, inputs, found["keys", layer], heads, beams, found["present"])
    features = seen.hidden_states[model.config.vision_feature_layer][:, first:]
    same(family, inputs, found["features"], features, beams, found["present"])
    same(family, inputs, found["embeddings"], project(family, model, features), beams, found["present"])
    assert found["layers"] == len(seen.attentions)
    for b, row in enumerate(family.table(inputs)):  # tokens of one patch, and those pooled before the projector
        tokens = [token for _, token in sorted(row.items()) if not token.marker]
        whole = [i for i, token in enumerate(tokens) if len(token.parts) == 1 or not family.video_newlines]
        apart = found["projected"][b * beams, whole] - found["embeddings"][b * beams, whole]
        assert apart.abs().max() < 1e-5 * found["embeddings"].abs().max()


def project(family: Packed, model: Any, features: torch.Tensor) -> torch.Tensor:
    """Of patches. Where frames are pooled before the projector, every patch of a window gets what the window projects to, so
    that means over windows are what the model embeds."""
    side = family.side
    if family.video_newlines:
        return model.model.multi_modal_projector(features)
    tiles = len(features) - sum(x == "video" for row in family.rows for x in row) * family.frames
    pooled = model.model.vision_resampler(features[tiles:]) if tiles < len(features) else features[tiles:]
    out = model.model.multi_modal_projector(features)
    if len(pooled):
        windows = model.model.multi_modal_projector(pooled).unflatten(1, (family.pooled, family.pooled))
        step = side // family.pooled
        out[tiles:] = windows.repeat_interleave(step, 1).repeat_interleave(step, 2).flatten(1, 2)
    return out


def pictures(family: Packed, inputs: Any) -> torch.Tensor:
    """All tiles of the batch, without those that pad it, and then all video frames."""
    spans = [
        (x, sum(isinstance(y, tuple) for y in row) == 1) for row in family.rows for x in row if isinstance(x, tuple)
    ]
    counts = [family.tiles(x, alone=alone) for x, alone in spans]
    found = [p[:n] for p, n in zip(inputs["pixel_values"], counts, strict=True)]
    return torch.cat([*found, *inputs.get("pixel_values_videos", [])])


def expected(family: Packed, inputs: Any, values: torch.Tensor, beams: int) -> torch.Tensor:
    """(B, V, C) from (pictures, patches, C): means over the patches of each visual token; 0 where a row has fewer."""
    rows = []
    for row in family.table(inputs):
        tokens = [token for _, token in sorted(row.items()) if not token.marker]
        rows.append(torch.stack([sum(w * values[p, q] for p, q, w in token.parts) for token in tokens]))  # type: ignore[misc]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).repeat_interleave(beams, 0)


def same(
    family: Packed, inputs: Any, mine: torch.Tensor, values: torch.Tensor, beams: int, present: torch.Tensor
) -> None:
    mine = mine[..., None] if mine.ndim == 2 else mine
    right = expected(family, inputs, values, beams)
    difference = (mine - right).abs().max() / right.abs().max().clamp(min=1)
    assert difference < 1e-5, difference
    # neighbours differ by more than the tolerance, so that values on the wrong token would be noticed
    apart = (right[:, 1:] - right[:, :-1]).abs().amax(dim=-1)[present[:, 1:]]
    assert apart.median() > 1e-4, apart.median()


def second_turn_hides_what_was_dropped(family: Packed) -> None:
    """Text after a pruned prompt: nothing is pruned again, and the dropped columns stay hidden."""
    model, reference, inputs = family.model(), family.model(attention="eager"), family.prompts()
    with mmeff.accelerate(model, checks.EveryThird(schedule="1:0.5")) as handle:
        first = checks.generate(model, inputs)
        hidden = {1: checks.dropped_columns(family.visual(model, inputs), handle.report().kept[1])}
        more = torch.randint(5, 48, (len(first.sequences), 4), generator=torch.Generator().manual_seed(9))
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(more), 9, dtype=torch.long)], dim=1)
        turn = {"input_ids": torch.cat([first.sequences, more], dim=1), "attention_mask": mask}
        fast = checks.generate(model, turn, past_key_values=copy.deepcopy(first.past_key_values))
    with checks.MaskedReference(checks.language(reference).layers, hidden):
        before = checks.generate(reference, inputs)
        slow = checks.generate(reference, turn, past_key_values=before.past_key_values)
    checks.assert_same_run(fast, slow)


def encode(model: Any, inputs: Any) -> dict[str, Any]:
    """Features of all pictures and videos, as a user makes them."""
    names = ("pixel_values", "image_sizes", "batch_num_images")
    found = {}
    if "pixel_values" in inputs:
        found["image"] = model.model.get_image_features(**{k: inputs[k] for k in names if k in inputs})
    if "pixel_values_videos" in inputs:
        found["video"] = model.model.get_video_features(pixel_values_videos=inputs["pixel_values_videos"])
    return found


def shortened_prompt_equals_pruning_at_layer_0(family: Packed) -> None:
    """A stock model on the kept tokens alone, at their original positions, computes what pruning before layer 0 does."""
    model = family.model()
    for b in range(len(family.rows)):
        inputs = family.row(family.prompts(), b)
        rows = [family.rows[b]]
        with mmeff.accelerate(model, checks.EveryThird(schedule="0:0.4")) as handle:
            fast = model(**inputs, logits_to_keep=1, use_cache=True).logits
            kept = handle.report().kept[0][0].tolist()
        table = family.table(inputs, rows)[0]
        tokens = sorted(table)
        visual = [column for column in tokens if not table[column].marker]
        gone = set(visual) - {visual[k] for k in kept}
        stays = torch.tensor([c not in gone for c in range(inputs["input_ids"].shape[1])])
        encoded = encode(model, inputs)
        for kind, token in (("image", family.image), ("video", family.video)):
            if kind in encoded:
                here = inputs["input_ids"][0] == token
                whole = torch.cat([x.view(-1, x.shape[-1]) for x in encoded[kind].pooler_output])
                kept_of_kind = whole[stays[here]]
                encoded[kind].pooler_output = [kept_of_kind] if kind == "image" else kept_of_kind[None]
        slow = model(
            input_ids=inputs["input_ids"][:, stays],
            position_ids=stays.nonzero().T,
            mm_encoder_outputs=encoded,
            logits_to_keep=1,
        ).logits
        assert (fast - slow).abs().max() < 1e-5


def features_passed_in_equal_pixels(family: Packed, *, beams: int) -> None:
    """With the features in place of the pixels the same tokens are kept, and the same text is generated."""
    model, inputs = family.model(), family.prompts()
    method = checks.EveryThird(schedule="1:0.5", quota="frame")
    with mmeff.accelerate(model, method) as handle:
        pixels = checks.generate(model, inputs, num_beams=beams)
        kept = handle.report().kept[1]
        rest = {k: v for k, v in inputs.items() if not k.startswith("pixel_values")}
        ready = checks.generate(model, {**rest, "mm_encoder_outputs": encode(model, inputs)}, num_beams=beams)
        assert torch.equal(handle.report().kept[1], kept)
    checks.assert_same_run(ready, pixels)


def plan_counts_what_runs(family: Packed, rows: list[list[Any]], **sizes: int) -> Any:
    model, method = family.model(), checks.EveryThird(schedule="1:0.5,3:0.2")
    plan = mmeff.plan(model, method, text_tokens=10, **sizes)
    with mmeff.accelerate(model, method) as handle:
        checks.generate(model, family.make(rows))
        tokens = handle.report().tokens
    said = dict(plan.rows)
    assert float(said["visual tokens"].split()[0]) == tokens["visual tokens per prompt"]
    assert float(said["mean over layers"]) == tokens["mean over layers"]
    for layer in (1, 3):
        assert f"{tokens[f'kept from layer {layer} on']:.0f} from layer {layer} on" in said["kept"]
    return said["visual tokens"]


def tokenizer() -> Any:
    """One id per word w5, w6, ...; pictures and videos have those of the small models."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "<unk>": 2, "<video>": 3, "<image>": 4, **{f"w{i}": i for i in range(5, 48)}}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", unk_token="<unk>", padding_side="left",
        additional_special_tokens=["<image>", "<video>"],
    )  # fmt: skip


def what_the_processor_makes_is_pruned(family: Packed, processor: Any) -> None:
    """The prompts of the family, made by its own processor, have tokens where they are expected, and prune exactly."""
    draw = torch.Generator().manual_seed(1)

    def pixels(*size: int) -> torch.Tensor:
        return torch.randint(0, 256, (3, *size), generator=draw, dtype=torch.uint8)

    texts, pictures, videos = [], [], []
    for row in family.rows:
        words, here = [], []
        for item in row:
            if isinstance(item, int):
                words += [f"w{5 + (7 * i + item) % 43}" for i in range(item)]
            elif item == "video":
                words.append("<video>")
                videos.append(torch.stack([pixels(family.unit, family.unit) for _ in range(family.frames)]))
            else:
                words.append("<image>")
                here.append(pixels(*item))
        texts.append(" ".join(words))
        pictures += [here] if here else []
    given = {"images": pictures, **({"videos": videos} if videos else {})}
    inputs = dict(processor(text=texts, padding=True, return_tensors="pt", **given))
    plain = family.prompts()
    for name in ("input_ids", "pixel_values", "image_sizes", "pixel_values_videos", "batch_num_images"):
        assert (name in inputs) == (name in plain)
        if name in plain:
            assert inputs[name].shape == plain[name].shape
    special = plain["input_ids"].clamp(max=5)
    assert torch.equal(inputs["input_ids"].clamp(max=5), special)

    class Processed(type(family)):  # type: ignore[misc]
        def prompts(self) -> Any:
            return inputs

    checks.equals_masked_reference(Processed(), checks.EveryThird(schedule="0:0.75,2:0.3", quota="frame"))
