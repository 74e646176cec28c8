"""The tiny video VLM: the stock LLaVA model of `vlm_model` over eight frames, started from the tiny image VLM.

A prompt is `<s>`, then for every frame its word and its 36 image tokens, then the question.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mmeff.tiny import motions, vlm_model

SIDE = motions.SIZE // vlm_model.PATCH  # 6 x 6 visual tokens a frame
PER_FRAME = SIDE * SIDE
VISUAL = motions.FRAMES * PER_FRAME
FIRST = 1 + motions.FRAMES * (PER_FRAME + 1)  # position of a question's first token

# Positions in the prompt: of the frames' words, and of every visual token.
WORD_PLACES = 1 + torch.arange(motions.FRAMES) * (PER_FRAME + 1)
VISUAL_PLACES = (WORD_PLACES[:, None] + 1 + torch.arange(PER_FRAME)).flatten()

CHAT_TEMPLATE = (
    "{% set frame = namespace(number=0) %}"
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{% set frame.number = frame.number + 1 %}"
    "{{ 'frame' ~ frame.number ~ ' <image> ' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def tokenizer() -> Any:
    """Word level over the vocabulary of `motions`."""
    return vlm_model.tokenizer(motions.words())


def processor() -> Any:
    """The stock LLaVA processor for frames of 48 x 48 pixels."""
    return vlm_model.processor(size=motions.SIZE, known=motions.words(), template=CHAT_TEMPLATE)


def model(start: str | Path | None = None) -> Any:
    """The network, untrained or with the weights of the tiny image VLM in the folder `start`.

    The image model's table of 12 x 12 places is averaged to 6 x 6. New words keep their random embeddings.
    """
    net = vlm_model.model(size=motions.SIZE)
    if start is not None:
        from transformers import LlavaForConditionalGeneration

        weights = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32).state_dict()
        name = "model.vision_tower.embeddings.position_embedding.weight"
        whole, patches = weights[name][:1], weights[name][1:]
        grid = patches.T.reshape(1, -1, vlm_model.SIDE, vlm_model.SIDE)
        weights[name] = torch.cat([whole, F.avg_pool2d(grid, vlm_model.SIDE // SIDE)[0].flatten(1).T])
        net.load_state_dict(weights)
    return net
