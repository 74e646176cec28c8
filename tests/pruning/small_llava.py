"""The small random LLaVA as a family of the checks: rows of two, one and three images."""

from __future__ import annotations

from .conftest import IMAGE, prompts, random_llava


class SmallLlava:
    model = staticmethod(lambda *, attention="sdpa", seed=0: random_llava(attention=attention, seed=seed))
    prompts = staticmethod(lambda: prompts([18, 5, 29], images=[2, 1, 3]))

    @staticmethod
    def row(inputs, b):
        real = inputs["attention_mask"][b].bool()
        counts = (inputs["input_ids"] == IMAGE).sum(1) // 16
        first = int(counts[:b].sum())
        alone = {k: inputs[k][b][real][None] for k in ("input_ids", "attention_mask")}
        return {**alone, "pixel_values": inputs["pixel_values"][first : first + int(counts[b])]}

    @staticmethod
    def visual(model, inputs):
        return inputs["input_ids"] == IMAGE
