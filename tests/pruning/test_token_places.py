"""Where a report says that tokens lie, against what the encoder sees: a small square is drawn into a picture, and the tokens
that change most must lie where it is. Pictures go through the processors of transformers; attention between patches is
silenced, so that a patch knows nothing of its neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mmeff
from mmeff.pruning._base import Decision, LayerView
from mmeff.pruning.hosts._boxes import arrangement, in_square

from . import host_checks as checks
from . import small_internvl, small_smolvlm
from .small_internvl import SmallInternVL
from .small_llava import SmallLlava
from .small_llava_next import Packed, SmallLlavaNext
from .small_llava_next_video import SmallLlavaNextVideo
from .small_llava_onevision import SmallLlavaOnevision
from .small_qwen_vl import IMAGE as QWEN_IMAGE
from .small_qwen_vl import PATCH as QWEN_PATCH
from .small_qwen_vl import VIDEO as QWEN_VIDEO
from .small_qwen_vl import SmallQwen
from .small_smolvlm import SmallSmolVLM
from .small_video_llama3 import IMAGE as LLAMA3_IMAGE
from .small_video_llama3 import PATCH as LLAMA3_PATCH
from .small_video_llama3 import SmallVideoLlama3
from .tile_checks import encode

WORDS = [11, 12, 13]
PICTURES = [(132, 68), (50, 140)]  # width, height
SPOTS = [(0.08, 0.12), (0.9, 0.3), (0.45, 0.55), (0.2, 0.93)]  # shares of width and height


def picture(size: tuple[int, int], spot: tuple[float, float] | None, *, seen: tuple[int, int] | None = None) -> Any:
    """A slope of grey, and a white square around a spot of it; `seen` is the size of the middle that the spot is in."""
    x, y = np.meshgrid(np.linspace(0, 90, size[0]), np.linspace(0, 90, size[1]))
    pixels = np.repeat((x + 0.5 * y)[..., None], 3, axis=2)
    if spot is not None:
        inner = seen or size
        cx, cy = ((whole - part) / 2 + at * part for whole, part, at in zip(size, inner, spot, strict=True))
        half = 0.04 * min(inner)
        pixels[round(cy - half) : round(cy + half) + 1, round(cx - half) : round(cx + half) + 1] = 255
    return Image.fromarray(pixels.astype(np.uint8))


def quiet(model: Any) -> Any:
    """No patch looks at another."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ("vision" in name or "visual" in name) and any(
                x in name for x in ("out_proj", "o_proj", "projection_layer", "attn.proj")
            ):
                p.zero_()
    return model


def see(model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """What entered the language model at each visual token of the only row, and their places."""
    found = []

    @dataclass(frozen=True, kw_only=True)
    class Probe(checks.EveryThird):
        def decide(self, view: LayerView) -> Decision:
            found.append(view.embeddings()[0])
            return Decision(view.present)

    with mmeff.accelerate(model, Probe(schedule="0:1.0")) as handle, torch.no_grad():
        model(**inputs, logits_to_keep=1, use_cache=True)
        places = handle.report().places
    return found[0], places


def prompt(runs: list[list[int]], extra: dict[str, Any]) -> dict[str, Any]:
    ids = torch.tensor([[*WORDS, *(i for run in runs for i in [*run, *WORDS])]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}


def counts(model: Any, given: dict[str, Any]) -> list[int]:
    return [x.reshape(-1, x.shape[-1]).shape[0] for x in encode(model, given)["image"].pooler_output]


def llava(model: Any, images: list[Any]) -> dict[str, Any]:
    from transformers import CLIPImageProcessor

    given = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)(images, return_tensors="pt")
    return prompt([[4] * n for n in counts(model, given)], dict(given))


def packed(name: str, unit: int) -> Any:
    def make(model: Any, images: list[Any]) -> dict[str, Any]:
        import transformers

        size = {"shortest_edge": unit} if name == "LlavaNext" else {"height": unit, "width": unit}
        crop = {"crop_size": {"height": unit, "width": unit}} if name == "LlavaNext" else {}
        processor = getattr(transformers, f"{name}ImageProcessor")(
            size=size, image_grid_pinpoints=model.config.image_grid_pinpoints, **crop
        )
        given = dict(processor([images], return_tensors="pt"))  # pictures of one prompt
        return prompt([[Packed.image] * n for n in counts(model, given)], given)

    return make


def internvl(model: Any, images: list[Any]) -> dict[str, Any]:
    from transformers import GotOcr2ImageProcessor

    unit = small_internvl.SIDE * small_internvl.PATCH
    processor = GotOcr2ImageProcessor(size={"height": unit, "width": unit}, crop_to_patches=True, max_patches=6)
    each = [processor(image, return_tensors="pt")["pixel_values"] for image in images]
    start, end, token = small_internvl.START, small_internvl.END, small_internvl.IMAGE
    return prompt([[start, *[token] * 9 * len(x), end] for x in each], {"pixel_values": torch.cat(each)})


def smolvlm(model: Any, images: list[Any]) -> dict[str, Any]:
    from transformers import SmolVLMImageProcessor

    unit, s = small_smolvlm.SIDE * small_smolvlm.PATCH, small_smolvlm
    processor = SmolVLMImageProcessor(size={"longest_edge": 3 * unit}, max_image_size={"longest_edge": unit})
    given = processor([images], return_tensors="pt", return_row_col_info=True)
    runs = []
    for rows, columns in zip(given["rows"][0], given["cols"][0], strict=True):
        run: list[int] = []
        for y in range(rows):
            for x in range(columns):
                run += [s.FAKE, s.PLACE + 3 * y + x, *[s.IMAGE] * 9]
            run.append(s.BREAK)
        runs.append([*run, s.BREAK, s.FAKE, s.GLOBAL, *[s.IMAGE] * 9, s.FAKE])
    return prompt(runs, {k: given[k] for k in ("pixel_values", "pixel_attention_mask")})


def qwen(model: Any, images: list[Any]) -> dict[str, Any]:
    from transformers import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(
        patch_size=QWEN_PATCH, size={"shortest_edge": 8 * 8 * QWEN_PATCH**2, "longest_edge": 16 * 16 * QWEN_PATCH**2}
    )
    given = dict(processor(images, return_tensors="pt"))
    made = prompt([[QWEN_IMAGE] * (int(g.prod()) // 4) for g in given["image_grid_thw"]], given)
    return {**made, "mm_token_type_ids": (made["input_ids"] == QWEN_IMAGE).long()}


def video_llama3(model: Any, images: list[Any]) -> dict[str, Any]:
    from transformers import VideoLlama3ImageProcessor

    processor = VideoLlama3ImageProcessor(
        patch_size=LLAMA3_PATCH, size={"shortest_edge": 16 * LLAMA3_PATCH**2, "longest_edge": 100 * LLAMA3_PATCH**2}
    )
    given = dict(processor(images, return_tensors="pt"))
    merge = given["image_merge_sizes"]
    tokens = [int(g.prod()) // int(m) ** 2 for g, m in zip(given["image_grid_thw"], merge, strict=True)]
    return prompt([[LLAMA3_IMAGE] * n for n in tokens], given)


FAMILIES = {
    "llava": (SmallLlava, llava), "llava_next": (SmallLlavaNext, packed("LlavaNext", 16)),
    "llava_next_video": (SmallLlavaNextVideo, packed("LlavaNext", 16)),
    "llava_onevision": (SmallLlavaOnevision, packed("LlavaOnevision", 20)), "internvl": (SmallInternVL, internvl),
    "smolvlm": (SmallSmolVLM, smolvlm), "video_llama3": (SmallVideoLlama3, video_llama3),
    **{kind: (lambda kind=kind: SmallQwen(kind), qwen) for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
}  # fmt: skip
TILED = {"llava_next", "llava_next_video", "llava_onevision", "internvl", "smolvlm"}
CASES = [(name, [0, 1]) for name in FAMILIES] + [("llava_onevision", [0]), ("llava_onevision", [1])]


@pytest.mark.parametrize(("name", "chosen"), CASES, ids=lambda x: str(x))
def test_tokens_that_see_a_square_lie_where_it_is(name, chosen):
    family, make = FAMILIES[name]
    model, sizes = quiet(family().model()), [PICTURES[i] for i in chosen]
    middle = [(min(size),) * 2 if name == "llava" else size for size in sizes]
    plain, places = see(model, make(model, [picture(size, None) for size in sizes]))
    assert places.picture.shape == places.tile.shape == places.box.shape[:2] == (1, len(plain))
    assert sorted(set(places.picture[0].tolist())) == list(range(len(sizes)))
    assert bool(places.tile.any()) == (name in TILED and not (name == "llava_onevision" and len(chosen) > 1))
    for number, spot in ((number, spot) for number in range(len(sizes)) for spot in SPOTS):
        drawn = [picture(s, spot if i == number else None, seen=middle[i]) for i, s in enumerate(sizes)]
        marked, _ = see(model, make(model, drawn))
        change = (marked - plain).float().norm(dim=1)
        for tile in places.tile[0].unique().tolist():
            mine = (places.tile[0] == tile).nonzero()[:, 0]
            most = mine[change[mine].argmax()]
            assert int(places.picture[0, most]) == number, (spot, tile)
            left, top, right, bottom = places.box[0, most].tolist()
            near = 0.03  # the square is seen whole by tokens that its centre is at the edge of
            assert left - near <= spot[0] <= right + near and top - near <= spot[1] <= bottom + near, (spot, tile)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_cover_every_picture_once(name):
    """The boxes of a view share no area, and leave out less than half a token's breadth at the edges."""
    family, make = FAMILIES[name]
    model = family().model()
    _, places = see(model, make(model, [picture(size, None) for size in PICTURES]))
    for number in range(len(PICTURES)):
        for tile in (False, True):
            boxes = places.box[0][(places.picture[0] == number) & (places.tile[0] == tile)]
            boxes = boxes[~boxes.isnan().any(dim=1)].double()
            if len(boxes):
                lit = torch.zeros(400, 400)
                for x0, y0, x1, y1 in (boxes * 400).round().long().tolist():
                    lit[y0:y1, x0:x1] += 1
                widest = int((boxes[:, 2:] - boxes[:, :2]).max() * 400)
                inner = lit[widest // 2 + 1 : -(widest // 2 + 1), widest // 2 + 1 : -(widest // 2 + 1)]
                assert lit.max() <= 1 and inner.min() == 1, (number, tile)


def test_frames_of_videos_are_pictures():
    family = SmallQwen("qwen2_5_vl")
    inputs = family.prompts()
    model = family.model()
    with mmeff.accelerate(model, checks.EveryThird(schedule="1:0.5")) as handle:
        model(**inputs, logits_to_keep=1, use_cache=True)
        places = handle.report().places
    assert bool((inputs["input_ids"] == QWEN_VIDEO).any())
    for b, row in enumerate(family.where()):
        mine = places.picture[b][places.picture[b] >= 0]
        assert mine.tolist() == [frame for frame, _, _ in row]
        for number in set(mine.tolist()):
            at = [(y, x) for frame, y, x in row if frame == number]
            high, wide = (max(c) + 1 for c in zip(*at, strict=True))
            boxes = torch.tensor([[x / wide, y / high, (x + 1) / wide, (y + 1) / high] for y, x in at])
            torch.testing.assert_close(places.box[b][places.picture[b] == number], boxes)
        assert bool(places.box[b][len(row) :].isnan().all()) and bool((places.picture[b][len(row) :] == -1).all())


def test_the_arrangement_of_tiles_is_seen_in_them():
    x, y = torch.meshgrid(torch.linspace(0, 1, 96), torch.linspace(0, 1, 48), indexing="xy")
    whole = torch.stack([x, y, x * y])  # 48 x 96
    for rows, columns in ((1, 6), (2, 3), (3, 2), (6, 1)):
        size = (24 * rows, 24 * columns)
        fitted = torch.nn.functional.interpolate(whole[None], size=size, mode="bilinear", antialias=True)[0]
        view = torch.nn.functional.interpolate(whole[None], size=(24, 24), mode="bilinear", antialias=True)
        tiles = [fitted[:, 24 * r : 24 * r + 24, 24 * c : 24 * c + 24] for r in range(rows) for c in range(columns)]
        assert arrangement(torch.cat([torch.stack(tiles), view])) == (rows, columns)
    assert arrangement(torch.full((5, 3, 24, 24), 0.5)) is None, "nothing to tell by"
    assert arrangement(torch.rand(2, 3, 24, 24)) == (1, 1)


def test_boxes_of_a_padded_square():
    """A picture of 40 x 20 pixels stands in the middle of a square, between padding of 10 lines each."""
    box = torch.tensor([[0.0, 0.0, 0.5, 0.25], [0.0, 0.0, 0.5, 0.5], [0.5, 0.25, 1.0, 0.75]])
    found = in_square(box, 20, 40)
    assert bool(found[0].isnan().all())
    assert found[1:].tolist() == [[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 1.0]]
