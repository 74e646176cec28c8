"""Processors for the small random models of tests/pruning, around a tokenizer of a few words, built offline."""

from __future__ import annotations

from typing import Any

WORDS = ("what", "is", "in", "the", "picture", "?", "video", "and", "now", "where", "ring")
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% elif part['type'] == 'video' %}VIDEO{% else %} {{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def tokenizer(marks: list[str], size: int) -> Any:
    """Word level: id 0 pads, `marks` follow, then words up to `size` ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<pad>", *marks, *WORDS]
    known += [f"w{i}" for i in range(size - len(known))]
    model = models.WordLevel({word: i for i, word in enumerate(known)}, unk_token=known[-1])
    built = Tokenizer(model)
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>", additional_special_tokens=marks)


def template(image: str, video: str) -> str:
    """Media where they stand, then the text."""
    return TEMPLATE.replace("IMAGE", image).replace("VIDEO", video)


def qwen(patch: int = 4) -> Any:
    """For `SmallQwen("qwen2_5_vl")`."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<time>"]
    shared: dict[str, Any] = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size={"shortest_edge": 64, "longest_edge": 32 * 32}, **shared),
        tokenizer(marks, 48),
        Qwen2VLVideoProcessor(
            size={"shortest_edge": 64, "longest_edge": 4 * 24 * 24}, cap_pixels_per_frame=True, **shared
        ),
        chat_template=template(*(f"{marks[0]}{mark}{marks[1]}" for mark in marks[2:4])),
    )


def onevision(pinpoints: list[list[int]], size: int) -> Any:
    """For `SmallLlavaOnevision`: tiles of 20 x 20 pixels, 5 x 5 patches, a vocabulary of `size`."""
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    side = {"height": 20, "width": 20}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=pinpoints),
        tokenizer(["<s>", "</s>", "<video>", "<image>"], size),
        LlavaOnevisionVideoProcessor(size=side),
        num_image_tokens=25,
        vision_feature_select_strategy="full",
        chat_template=template("<image>", "<video>"),
        vision_aspect_ratio="anyres_max_2",
    )
