"""Small random SmolVLM models, and prompts of split pictures, whole ones and videos for them.

Inputs are made by hand as the processor makes them: a marker and a place in front of every tile, line breaks behind every row
of tiles, the view of the whole picture at the end, and empty pictures that fill up the batch.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .small_internvl import square_cells
from .tile_checks import Cell, Tiled, collate, loud, words

FAKE, GLOBAL, BREAK, IMAGE, TIME, PLACE = 1, 2, 3, 4, 5, 6
PATCH, SIDE, MERGE = 4, 9, 3  # pixels of a patch, patches of a tile: 3 x 3 tokens


class SmallSmolVLM(Tiled):
    """Rows of numbers (words), ("image", rows of tiles, columns of tiles) and ("video", frames)."""

    visual_ids = (IMAGE,)
    rows: ClassVar[list[list[Any]]] = [
        [2, ("image", 1, 2), 9],
        [1, ("image", 0, 0), 5],
        [3, ("video", 2), 2, ("image", 2, 1), 2, ("image", 0, 0), 6],
    ]

    def model(self, *, attention: str = "sdpa", seed: int = 0) -> Any:
        from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

        torch.manual_seed(seed)
        config = SmolVLMConfig(
            vision_config={
                "image_size": SIDE * PATCH, "patch_size": PATCH, "hidden_size": 16, "intermediate_size": 32,
                "num_hidden_layers": 3, "num_attention_heads": 2,
            },
            text_config=LlamaConfig(**self.text()), image_token_id=IMAGE, scale_factor=MERGE, pad_token_id=0,
        )  # fmt: skip
        return loud(SmolVLMForConditionalGeneration(config), attention)

    def tower(self, model: Any) -> Any:
        return model.model.vision_model

    def attentions(self, model: Any) -> list[Any]:
        return [layer.self_attn for layer in model.model.vision_model.encoder.layers]

    def make(self, rows: list[list[Any]]) -> dict[str, torch.Tensor]:
        texts, pictures = [], []
        for row in rows:
            draw, ids, mine = self.draw(row), [], 0
            for item in row:
                if isinstance(item, int):
                    ids += words(item, draw)
                    continue
                if item[0] == "video":
                    for t in range(item[1]):
                        ids += [TIME, 6 + t, FAKE, GLOBAL, *[IMAGE] * 9, FAKE]
                else:
                    for y in range(item[1]):
                        for x in range(item[2]):
                            ids += [FAKE, PLACE + 2 * y + x, *[IMAGE] * 9]
                        ids.append(BREAK)
                    ids += [BREAK] * bool(item[1]) + [FAKE, GLOBAL, *[IMAGE] * 9, FAKE]
                mine += tiles(item)
            texts.append(ids)
            pictures.append(torch.randn(mine, 3, SIDE * PATCH, SIDE * PATCH, generator=draw))
        pixels = torch.nn.utils.rnn.pad_sequence(pictures, batch_first=True)
        mask = torch.stack([(torch.arange(pixels.shape[1]) < len(p)).long() for p in pictures])
        mask = mask[..., None, None].expand(-1, -1, *pixels.shape[3:])
        return {**collate(texts), "pixel_values": pixels, "pixel_attention_mask": mask}

    def cells(self, rows: list[list[Any]] | None = None) -> list[list[Cell]]:
        found, tile = [], 0
        for row in self.rows if rows is None else rows:
            count = sum(tiles(item) for item in row if not isinstance(item, int))
            found.append([c for f in range(count) for c in square_cells(f, (tile + f) * SIDE**2, SIDE, MERGE)])
            tile += count
        return found


def tiles(item: Any) -> int:
    """How many pictures the encoder is given for an image or a video."""
    return item[1] if item[0] == "video" else item[1] * item[2] + 1
