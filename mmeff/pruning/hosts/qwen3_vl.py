"""Qwen3-VL: Qwen2.5-VL's packing without windows, and DeepStack (transformers' `Qwen3VLForConditionalGeneration`).

Frames of a video stand apart, each behind its time as text and between start and end tokens: that text lies in front of
visual tokens, always stays, and is not among the text that methods ask with. DeepStack adds features from inside the
vision encoder to the visual tokens behind each of the first decoder layers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmeff.handle import Handle
from mmeff.pruning.hosts._language import LanguagePruner
from mmeff.pruning.hosts.qwen_vl import Qwen25VLHost


class Qwen3VLHost(Qwen25VLHost):
    """Finds the decoder layers and the visual tokens of Qwen3-VL models, and takes DeepStack along."""

    name = "qwen3-vl"
    models = "transformers Qwen3VLForConditionalGeneration"
    architecture = ("transformers.models.qwen3_vl.modeling_qwen3_vl", "Qwen3VLForConditionalGeneration")

    @classmethod
    def standard(cls, model: Any) -> int:
        return int(model.config.vision_config.num_position_embeddings**0.5)  # its learned grid is a square

    @classmethod
    def prepare(cls, model: Any, pruner: LanguagePruner, handle: Handle) -> None:
        """Keep DeepStack's features on their tokens once others are gone. Merged tokens get those of the one that stays."""
        decoder = cls.language(model)
        own = decoder.__dict__.get("_deepstack_process")  # somebody else's wrapper on this instance
        original = decoder._deepstack_process

        def process(hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
            now = pruner.now
            if now is not None and now.changed:
                number = visual_pos_masks.flatten().cumsum(0).view_as(visual_pos_masks) - 1  # in the batch
                visual_pos_masks = visual_pos_masks.gather(1, now.cur)
                visual_embeds = visual_embeds[number.gather(1, now.cur)[visual_pos_masks]]
            left: Tensor = original(hidden_states, visual_pos_masks, visual_embeds)
            return left

        def restore() -> None:
            if own is None:
                del decoder._deepstack_process
            else:
                decoder._deepstack_process = own

        decoder._deepstack_process = process
        handle.on_remove(restore)


HOSTS = (Qwen3VLHost,)
