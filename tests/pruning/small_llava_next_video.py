"""Small random LLaVA-NeXT-Video models, and prompts with pictures and videos in either order."""

from __future__ import annotations

from typing import Any, ClassVar

from .small_llava_next import Packed, clip, llama


class SmallLlavaNextVideo(Packed):
    rows: ClassVar[list[list[Any]]] = [[1, (8, 32), 18], [1, "video", 5], [1, "video", 3, (32, 20), 2, "video", 9]]

    def model(self, *, attention: str = "sdpa", seed: int = 0, **fields: Any) -> Any:
        from transformers import (
            CLIPVisionConfig,
            LlamaConfig,
            LlavaNextVideoConfig,
            LlavaNextVideoForConditionalGeneration,
        )

        config = LlavaNextVideoConfig(
            vision_config=clip(CLIPVisionConfig), text_config=llama(LlamaConfig), vision_feature_layer=-2,
            video_token_index=self.video, **self.config(), **fields,
        )  # fmt: skip
        return self.build(attention, seed, lambda: LlavaNextVideoForConditionalGeneration(config))
