"""Small random Qwen2-VL, Qwen2.5-VL and Qwen3-VL models, and prompts of images and videos of different sizes for them.

Inputs are made by hand as the processors make them: patches in blocks of 2 x 2, one grid (frames, rows, columns) per picture
or video, start and end tokens around each, and in Qwen3-VL times in front of every frame.
"""

from __future__ import annotations

from typing import Any

import torch

START, END, IMAGE, VIDEO, TIME = 1, 2, 3, 4, 5
WORDS = 48
PATCH = 4  # pixels
Item = tuple[int, ...]  # (frames, rows, columns) in patches for a video, (rows, columns) for an image, (n,) for n words

# Sizes differ within a row and between rows; the padding of the second row reaches into the pictures of the others; the
# largest is 5 x 3 tokens, more than a window of 2 x 2 tokens along both sides.
ROWS: list[list[Item]] = [
    [(2,), (10, 6), (3,), (4, 4), (9,)],
    [(1,), (4, 2), (5,)],
    [(3,), (3, 4, 6), (2,), (6, 4), (4,), (2, 2, 4), (6,)],
]


class SmallQwen:
    """A family for the checks. kind: "qwen2_vl", "qwen2_5_vl" or "qwen3_vl"; items: the rows of `prompts`."""

    def __init__(self, kind: str, items: list[list[Item]] = ROWS) -> None:
        self.kind, self.items = kind, items

    def model(self, *, attention: str = "sdpa", seed: int = 0, layers: int = 5) -> Any:
        import transformers

        prefix = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[self.kind]
        torch.manual_seed(seed)
        vision: dict[str, Any] = {"depth": 3, "num_heads": 2, "patch_size": PATCH, "in_channels": 3}
        section = [2, 1, 1]
        if self.kind == "qwen2_vl":
            vision |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
        else:
            vision |= {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32}
        if self.kind == "qwen2_5_vl":
            vision |= {"window_size": 4 * PATCH, "fullatt_block_indexes": [1], "tokens_per_second": 2}
        if self.kind == "qwen3_vl":
            vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        text = {
            "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section},
        }  # fmt: skip
        config = getattr(transformers, f"{prefix}Config")(
            vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO,
            vision_start_token_id=START, vision_end_token_id=END,
        )  # fmt: skip
        model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config).eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.ndim == 2 and "embed" not in name:
                    # the default 0.02 leaves attention almost uniform: every selection would look alike
                    p.mul_(20.0 if "qkv" in name else 6.0)
                elif p.ndim == 5 or "pos_embed" in name:
                    p.mul_(20.0)
            model.model.language_model.embed_tokens.weight.normal_(std=1.0)
        model.set_attn_implementation(attention)
        return model

    def prompts(self) -> dict[str, torch.Tensor]:
        return self.inputs(self.items)

    def inputs(self, items: list[list[Item]], *, seed: int = 3) -> dict[str, torch.Tensor]:
        """A left-padded batch of these rows. Pixels and words depend on the row's items and the seed alone."""
        rows, pixels, grids = [], {1: [], 2: []}, {1: [], 2: []}  # type: ignore[var-annotated]
        for row in items:
            draw = torch.Generator().manual_seed(seed + 1000 * len(row) + sum(map(sum, row)))
            ids: list[int] = []
            for item in row:
                if len(item) == 1:
                    ids += torch.randint(6, WORDS, item, generator=draw).tolist()
                    continue
                grid = item if len(item) == 3 else (1, *item)
                kind, frame = len(item) - 1, grid[1] * grid[2] // 4
                token = IMAGE if kind == 1 else VIDEO
                if self.kind == "qwen3_vl" and kind == 2:
                    for t in range(grid[0]):
                        ids += [TIME, 6 + t, START, *[token] * frame, END]
                else:
                    ids += [START, *[token] * frame * grid[0], END]
                grids[kind].append(grid)
                count = grid[0] * grid[1] * grid[2]
                pixels[kind].append(torch.randn(count, 3 * 2 * PATCH * PATCH, generator=draw))
            rows.append(torch.tensor(ids))
        size = max(map(len, rows))
        ids_ = torch.stack([torch.cat([torch.zeros(size - len(r), dtype=torch.long), r]) for r in rows])
        found = {
            "input_ids": ids_,
            "attention_mask": torch.stack([(torch.arange(size) >= size - len(r)).long() for r in rows]),
            "mm_token_type_ids": ((ids_ == IMAGE) + 2 * (ids_ == VIDEO)).int(),
        }
        for kind, name, grid_name in (
            (1, "pixel_values", "image_grid_thw"),
            (2, "pixel_values_videos", "video_grid_thw"),
        ):
            if grids[kind]:
                found |= {name: torch.cat(pixels[kind]), grid_name: torch.tensor(grids[kind])}
        if self.kind == "qwen2_5_vl" and grids[2]:
            found["second_per_grid_ts"] = torch.arange(1, len(grids[2]) + 1).float()
        return found

    def row(self, inputs: dict[str, torch.Tensor], b: int) -> dict[str, torch.Tensor]:
        alone = self.inputs([self.items[b]])
        real = inputs["attention_mask"][b].bool()
        assert torch.equal(alone["input_ids"][0], inputs["input_ids"][b][real])
        if "second_per_grid_ts" in alone:  # its videos are not the first ones of the batch
            before = sum(len(item) == 3 for row in self.items[:b] for item in row)
            alone["second_per_grid_ts"] += before
        return alone

    def visual(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)

    def where(self) -> list[list[tuple[int, int, int]]]:
        """(frame, row, column) of the visual tokens of each row, from the items."""
        found = []
        for row in self.items:
            mine, frame = [], 0
            for item in (i for i in row if len(i) > 1):
                t, h, w = item if len(item) == 3 else (1, *item)
                mine += [(frame + f, y, x) for f in range(t) for y in range(h // 2) for x in range(w // 2)]
                frame += t
            found.append(mine)
        return found
