"""Small random LLaVA-OneVision models, and prompts with a shrunk grid, several pictures, and a picture behind a video."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .small_llava_next import Packed, llama, weights


class SmallLlavaOnevision(Packed):
    side, unit, shrink_beyond = 5, 20, 2
    frames, pooled = 2, 3  # from 5 x 5 patches, as 14 x 14 from 27 x 27
    pinpoints: ClassVar[list[list[int]]] = [[20, 20], [20, 40], [40, 20], [40, 40]]
    grids: ClassVar[dict[Any, tuple[int, int]]] = {
        (40, 32): (2, 2),
        (10, 40): (1, 2),
        (20, 30): (1, 2),
        (12, 20): (1, 1),
    }
    multi_image_tiles, video_newlines = False, 1
    rows: ClassVar[list[list[Any]]] = [[1, (40, 32), 18], [1, (20, 30), 3, (12, 20), 5], [1, "video", 3, (10, 40), 9]]

    def model(self, *, attention: str = "sdpa", seed: int = 0) -> Any:
        from transformers import (
            LlavaOnevisionConfig,
            LlavaOnevisionForConditionalGeneration,
            Qwen2Config,
            SiglipVisionConfig,
        )

        config = LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(
                image_size=20, patch_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                num_attention_heads=2, vision_use_head=False,
            ),
            text_config=llama(Qwen2Config), video_token_index=self.video, vision_aspect_ratio="anyres_max_2",
            **self.config(),
        )  # fmt: skip
        return self.build(attention, seed, lambda: LlavaOnevisionForConditionalGeneration(config))

    def counted(self, rows: list[list[Any]]) -> dict[str, torch.Tensor]:
        counts = [sum(isinstance(x, tuple) for x in row) for row in rows]
        return {"batch_num_images": torch.tensor([n for n in counts if n])}

    def window(self, index: int) -> list[tuple[int, float]]:
        return weights(index, self.side, self.pooled)
