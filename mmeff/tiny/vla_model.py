"""The tiny VLA: the tiny VLM's architecture and words, the words of the manipulation task, and three action words as answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmeff.tiny import manipulation, scenes, vlm_model

ACTION_TOKENS = 3


def vocabulary() -> list[str]:
    """The words of the VLM, then those of the task."""
    return [*scenes.words(), *manipulation.words()]


def processor() -> Any:
    """The stock LLaVA processor with the vocabulary of the VLA."""
    return vlm_model.processor(known=vocabulary())


def model(start: str | Path | None = None) -> Any:
    """The network, untrained or with the weights of the tiny VLM in the folder `start`, whose words it keeps."""
    net = vlm_model.model()
    if start is not None:
        from transformers import LlavaForConditionalGeneration

        net.load_state_dict(LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32).state_dict())
    return net


def policy(net: Any) -> manipulation.Policy:
    """The model as a greedy policy that reads what the stock processor would make of picture and instruction."""
    words = vlm_model.tokenizer(vocabulary())

    @torch.no_grad()
    def act(images: np.ndarray, instructions: list[str]) -> np.ndarray:
        texts = ["<image>" * vlm_model.VISUAL + text for text in instructions]
        prompt = words(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        pixels = vlm_model.pixels(images)
        out = net.generate(**prompt, pixel_values=pixels, max_new_tokens=ACTION_TOKENS, do_sample=False)
        said = words.batch_decode(out[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        return np.array([manipulation.read_action(text) for text in said])

    return act
