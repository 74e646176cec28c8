"""Small random VideoLLaMA3 models, and prompts of pictures and of thinned videos of different sizes for them.

Inputs are made by hand as the processor makes them: patches block by block, merge sizes of 1 for pictures and 2 for videos, a
compression mask, and times as text in front of each frame.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .tile_checks import Cell, Tiled, collate, loud, words

IMAGE, VIDEO, TIME = 3, 4, 5
PATCH = 4  # pixels


class SmallVideoLlama3(Tiled):
    """Rows of numbers (words), ("image", rows, columns) and ("video", frames, rows, columns), in patches.

    thin: whether videos lose tokens. image_merge: patches along a side of an image's token.
    """

    visual_ids = (IMAGE, VIDEO)
    rows: ClassVar[list[list[Any]]] = [
        [2, ("image", 4, 6), 3, ("image", 2, 4), 9],
        [1, ("image", 2, 4), 5],
        [3, ("video", 3, 4, 8), 2, ("image", 4, 2), 2, ("video", 2, 6, 4), 6],
    ]

    def __init__(self, rows: list[list[Any]] | None = None, *, thin: bool = True, image_merge: int = 1) -> None:
        super().__init__(rows)
        self.thin, self.merges = thin, {"image": image_merge, "video": 2}

    def model(self, *, attention: str = "sdpa", seed: int = 0) -> Any:
        from transformers import Qwen2Config, VideoLlama3Config, VideoLlama3ForConditionalGeneration

        torch.manual_seed(seed)
        config = VideoLlama3Config(
            vision_config={
                "patch_size": PATCH, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
                "num_attention_heads": 2,
            },
            text_config=Qwen2Config(**self.text()), image_token_id=IMAGE, video_token_id=VIDEO,
        )  # fmt: skip
        return loud(VideoLlama3ForConditionalGeneration(config), attention)

    def tower(self, model: Any) -> Any:
        return model.model.vision_model

    def attentions(self, model: Any) -> list[Any]:
        return [layer.self_attn for layer in model.model.vision_model.encoder.layers]

    def left(self, item: Any) -> list[list[bool]]:
        """Which tokens of each frame are in the prompt; of the second one, none of the first row are where videos are thinned."""
        kind, frames, height, width = item if item[0] == "video" else ("image", 1, *item[1:])
        merge = self.merges[kind]
        across, tokens = width // merge, height * width // merge**2
        if kind == "image" or not self.thin:
            return [[True] * tokens for _ in range(frames)]
        return [
            [not t or (t == 1 and i >= across) or (t > 1 and i % 3 == 1) for i in range(tokens)] for t in range(frames)
        ]

    def make(self, rows: list[list[Any]]) -> dict[str, torch.Tensor]:
        texts: list[list[int]] = []
        pixels: dict[str, list[torch.Tensor]] = {"image": [], "video": []}
        grids: dict[str, list[list[int]]] = {"image": [], "video": []}
        masks: list[bool] = []
        for row in rows:
            draw, ids = self.draw(row), []
            for item in row:
                if isinstance(item, int):
                    ids += words(item, draw)
                    continue
                kind, grid = item[0], [*([1] if item[0] == "image" else []), *item[1:]]
                grids[kind].append(grid)
                pixels[kind].append(torch.randn(grid[0] * grid[1] * grid[2], 3 * PATCH * PATCH, generator=draw))
                for t, left in enumerate(self.left(item)):
                    if kind == "video":
                        masks += left
                        ids += [TIME, 6 + t]
                    ids += [IMAGE if kind == "image" else VIDEO] * sum(left)
            texts.append(ids)
        out = collate(texts)
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if grids[kind]:
                merge = torch.full((len(grids[kind]),), self.merges[kind])
                out |= {
                    name: torch.cat(pixels[kind]),
                    f"{kind}_grid_thw": torch.tensor(grids[kind]),
                    f"{kind}_merge_sizes": merge,
                }
        if masks:
            out["video_compression_mask"] = torch.tensor(masks)
        return out

    def cells(self, rows: list[list[Any]] | None = None) -> list[list[Cell]]:
        """The encoder runs over all images first, and then over all videos."""
        rows = self.rows if rows is None else rows
        items = [item for row in rows for item in row if not isinstance(item, int)]
        at = {"image": 0, "video": sum(h * w for kind, *size in items if kind == "image" for h, w in [size])}
        found = []
        for row in rows:
            mine, frame = [], 0
            for item in (item for item in row if not isinstance(item, int)):
                kind, width = item[0], item[-1]
                merge = self.merges[kind]
                across, area = width // merge, merge**2
                for left in self.left(item):
                    for i, there in enumerate(left):
                        if there:
                            mine.append(
                                Cell(
                                    frame,
                                    i // across,
                                    i % across,
                                    list(range(at[kind] + i * area, at[kind] + (i + 1) * area)),
                                )
                            )
                    at[kind] += len(left) * area
                    frame += any(left)  # one that lost all its tokens is none
            found.append(mine)
        return found
