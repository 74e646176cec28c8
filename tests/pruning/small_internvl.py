"""Small random InternVL models, and prompts of pictures of several tiles and of videos for them.

Inputs are made by hand as the processor makes them: start and end tokens around all tiles of a picture, and around each frame
of a video, with its number as text in front.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .tile_checks import Cell, Tiled, collate, loud, words

START, END, IMAGE, FRAME = 1, 2, 4, 5
PATCH, SIDE = 4, 6  # pixels of a patch, patches of a tile: 3 x 3 tokens


class SmallInternVL(Tiled):
    """Rows of numbers (words), ("image", tiles) and ("video", frames). qk_norm: as in the largest encoders of the family."""

    visual_ids = (IMAGE,)
    # sizes differ within a row and between rows; the padding of the second row reaches into the pictures of the others
    rows: ClassVar[list[list[Any]]] = [
        [2, ("image", 3), 9],
        [1, ("image", 1), 5],
        [3, ("video", 2), 2, ("image", 2), 6],
    ]

    def __init__(self, rows: list[list[Any]] | None = None, *, qk_norm: bool = False) -> None:
        super().__init__(rows)
        self.qk_norm = qk_norm

    def model(self, *, attention: str = "sdpa", seed: int = 0) -> Any:
        from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

        torch.manual_seed(seed)
        config = InternVLConfig(
            vision_config=InternVLVisionConfig(
                image_size=[SIDE * PATCH] * 2, patch_size=[PATCH] * 2, hidden_size=16, intermediate_size=32,
                num_hidden_layers=3, num_attention_heads=2, use_qk_norm=self.qk_norm, attention_bias=True,
                norm_type="rms_norm" if self.qk_norm else "layer_norm",
            ),
            text_config=Qwen2Config(**self.text()), image_token_id=IMAGE, image_seq_length=9, tie_word_embeddings=False,
        )  # fmt: skip
        return loud(InternVLForConditionalGeneration(config), attention)

    def tower(self, model: Any) -> Any:
        return model.model.vision_tower

    def attentions(self, model: Any) -> list[Any]:
        return [layer.attention for layer in model.model.vision_tower.encoder.layer]

    def make(self, rows: list[list[Any]]) -> dict[str, torch.Tensor]:
        texts, pixels = [], []
        for row in rows:
            draw, ids = self.draw(row), []
            for item in row:
                if isinstance(item, int):
                    ids += words(item, draw)
                    continue
                kind, tiles = item
                pixels.append(torch.randn(tiles, 3, SIDE * PATCH, SIDE * PATCH, generator=draw))
                if kind == "image":
                    ids += [START, *[IMAGE] * 9 * tiles, END]
                else:
                    for t in range(tiles):
                        ids += [FRAME, 6 + t, START, *[IMAGE] * 9, END]
            texts.append(ids)
        return {**collate(texts), "pixel_values": torch.cat(pixels)}

    def cells(self, rows: list[list[Any]] | None = None) -> list[list[Cell]]:
        found, tile = [], 0
        for row in self.rows if rows is None else rows:
            mine, first = [], tile
            for _, tiles in (item for item in row if not isinstance(item, int)):
                for _ in range(tiles):
                    mine += square_cells(tile - first, tile * SIDE**2, SIDE, 2)
                    tile += 1
            found.append(mine)
        return found


def square_cells(frame: int, before: int, side: int, merge: int) -> list[Cell]:
    """Of a square picture of side x side patches, which follow `before` others."""
    return [
        Cell(
            frame,
            y,
            x,
            [before + (y * merge + dy) * side + x * merge + dx for dy in range(merge) for dx in range(merge)],
        )
        for y in range(side // merge)
        for x in range(side // merge)
    ]
