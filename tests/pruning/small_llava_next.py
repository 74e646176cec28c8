"""Small random LLaVA-NeXT models, and what they share with their kin: prompts of packed pictures, and where each token is from.

The tokens of a picture are laid out here by hand, one by one, with the patches that each is a mean of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class Token:
    """One packed token: its frame in the picture or video, its place there, and its patches as (picture, patch, weight)."""

    frame: int = 0
    row: int = 0
    column: int = 0
    parts: list[tuple[int, int, float]] = field(default_factory=list)

    @property
    def marker(self) -> bool:
        return not self.parts


def weights(index: int, old: int, new: int) -> list[tuple[int, float]]:
    """Bilinear weights of the `old` samples that entry `index` of `new` ones is made of."""
    at = max(0.0, (index + 0.5) * old / new - 0.5)
    low = int(at)
    return [(low, 1 - (at - low)), (min(low + 1, old - 1), at - low)]


class Packed:
    """A family that packs tiles; `rows` are prompts of numbers (text tokens), sizes (pictures) and "video"."""

    side, unit, shrink_beyond, frames, pooled = 4, 16, 0, 3, 2
    pinpoints: ClassVar[list[list[int]]] = [[16, 32], [32, 16], [32, 32], [48, 32]]
    grids: ClassVar[dict[Any, tuple[int, int]]] = {
        (8, 32): (1, 2),
        (32, 20): (2, 2),
        (40, 32): (3, 2),
    }  # tiles of each size
    image, video = 4, 3
    multi_image_tiles, video_newlines = True, 0
    rows: ClassVar[list[list[Any]]] = [[1, (8, 32), 18], [1, (32, 20), 5], [1, (40, 32), 3, (8, 32), 29]]

    def build(self, attention: str, seed: int, make: Any) -> Any:
        torch.manual_seed(seed)
        model = make().eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.ndim == 2 and "embed_tokens" not in name:
                    p.mul_(6.0)  # the default 0.02 leaves attention almost uniform: every selection would look alike
            model.model.language_model.embed_tokens.weight.normal_(std=1.0)
        model.set_attn_implementation(attention)
        return model

    def config(self) -> dict[str, Any]:
        return {"image_token_index": self.image, "image_grid_pinpoints": self.pinpoints}

    # ---- where tokens are from

    def tokens(self, item: Any, *, alone: bool = True) -> list[Token]:
        """Of one picture (a size) or of one video."""
        if item == "video":
            return self.video_tokens()
        side = self.side
        base = [Token(0, i // side, i % side, [(0, i, 1.0)]) for i in range(side * side)]
        if not alone and not self.multi_image_tiles:
            return [*base, Token()]
        high, wide = self.grids[item]
        down, right = self._unpadded(item, side * high, side * wide)
        rows = self._line(len(down), down, self._shrunk(len(down), len(right), 0))
        columns = self._line(len(right), right, self._shrunk(len(down), len(right), 1))
        grid = []
        for i, (y, ys) in enumerate(rows):
            for j, (x, xs) in enumerate(columns):
                parts = [
                    (1 + (a // side) * wide + b // side, (a % side) * side + b % side, v * w)
                    for a, v in ys for b, w in xs if v * w
                ]  # fmt: skip
                first = min(k for k, (c, _) in enumerate(rows) if int(c / side) == int(y / side))
                left = min(k for k, (c, _) in enumerate(columns) if int(c / side) == int(x / side))
                grid.append(Token(1 + int(y / side) * wide + int(x / side), i - first, j - left, parts))
            grid.append(Token())
        return base + grid

    @staticmethod
    def _unpadded(size: tuple[int, int], high: int, wide: int) -> tuple[list[int], list[int]]:
        """The lines and columns of a grid that a picture covers."""
        if size[1] / size[0] > wide / high:
            pad = (high - int(round(size[0] * wide / size[1], 7))) // 2
            return list(range(pad, high - pad)), list(range(wide))
        pad = (wide - int(round(size[1] * high / size[0], 7))) // 2
        return list(range(high)), list(range(pad, wide - pad))

    def _shrunk(self, high: int, wide: int, axis: int) -> int:
        ratio = math.sqrt(high * wide / (self.shrink_beyond * self.side**2)) if self.shrink_beyond else 0
        return int((high, wide)[axis] // ratio) if ratio > 1.1 else (high, wide)[axis]

    @staticmethod
    def _line(old: int, lines: list[int], new: int) -> list[tuple[float, list[tuple[int, float]]]]:
        """Centre of each of `new` lines in the whole grid, and what it is a mean of."""
        return [
            (lines[0] + (i + 0.5) * old / new, [(lines[k], w) for k, w in weights(i, old, new)]) for i in range(new)
        ]

    def video_tokens(self) -> list[Token]:
        found = []
        for f in range(self.frames):
            for i in range(self.pooled**2):
                row, column = divmod(i, self.pooled)
                parts = [(f, a * self.side + b, v * w) for a, v in self.window(row) for b, w in self.window(column)]
                found.append(Token(f, row, column, parts))
        return found + [Token()] * self.video_newlines

    def window(self, index: int) -> list[tuple[int, float]]:
        return [(2 * index, 0.5), (2 * index + 1, 0.5)]

    # ---- prompts

    def prompts(self) -> dict[str, torch.Tensor]:
        return self.make(self.rows)

    def make(self, rows: list[list[Any]]) -> dict[str, torch.Tensor]:
        """The inputs of a batch; pictures are random, and the same whichever rows they come with."""
        texts, pictures, videos = [], [], []
        for row in rows:
            images = [x for x in row if isinstance(x, tuple)]
            ids = []
            for k, item in enumerate(row):
                if isinstance(item, int):
                    draw = torch.Generator().manual_seed(100 * len(row) + 10 * k + item)
                    ids.append(torch.randint(5, 48, (item,), generator=draw))
                    continue
                token = self.video if item == "video" else self.image
                ids.append(torch.full((len(self.tokens(item, alone=len(images) == 1)),), token))
                draw = torch.Generator().manual_seed(hash((item if item != "video" else (0, 0), len(row), k)) % 2**31)
                shape = (3, self.unit, self.unit)
                if item == "video":
                    videos.append(torch.randn(self.frames, *shape, generator=draw))
                else:
                    pictures.append(torch.randn(self.tiles(item, alone=len(images) == 1), *shape, generator=draw))
            texts.append(torch.cat(ids))
        size = max(map(len, texts))
        out = {
            "input_ids": torch.stack([torch.nn.functional.pad(t, (size - len(t), 0)) for t in texts]),
            "attention_mask": torch.stack([(torch.arange(size) >= size - len(t)).long() for t in texts]),
        }
        if pictures:
            most = max(map(len, pictures))
            padded = [torch.nn.functional.pad(p, (0, 0) * 3 + (0, most - len(p))) for p in pictures]
            sizes = [x for row in rows for x in row if isinstance(x, tuple)]
            out |= {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(sizes), **self.counted(rows)}
        if videos:
            out["pixel_values_videos"] = torch.stack(videos)
        return out

    def counted(self, rows: list[list[Any]]) -> dict[str, torch.Tensor]:
        """What the family's processor says of the number of pictures."""
        return {}

    def tiles(self, item: Any, *, alone: bool) -> int:
        return 1 + math.prod(self.grids[item]) if alone or self.multi_image_tiles else 1

    def row(self, inputs: dict[str, torch.Tensor], b: int) -> dict[str, torch.Tensor]:
        return self.make([self.rows[b]])

    def table(self, inputs: dict[str, torch.Tensor], rows: list[list[Any]] | None = None) -> list[dict[int, Token]]:
        """For each row the token at each column of a picture or video; frames counted over the row, pictures of `parts` over
        all tiles of the batch and then all video frames."""
        rows = self.rows if rows is None else rows
        spans = [[(x, sum(isinstance(y, tuple) for y in row) == 1) for x in row] for row in rows]
        tiles = sum(self.tiles(x, alone=a) for row in spans for x, a in row if isinstance(x, tuple))
        at, found = {"image": 0, "video": tiles}, []
        for row, mask in zip(spans, inputs["attention_mask"], strict=True):
            column, frames, here = int((mask == 0).sum()), 0, {}
            for item, alone in row:
                if isinstance(item, int):
                    column += item
                    continue
                kind = "video" if item == "video" else "image"
                for token in (tokens := self.tokens(item, alone=alone)):
                    parts = [(at[kind] + p, q, w) for p, q, w in token.parts]
                    here[column] = Token(frames + token.frame, token.row, token.column, parts)
                    column += 1
                at[kind] += self.frames if kind == "video" else self.tiles(item, alone=alone)
                frames += max(t.frame for t in tokens) + 1
            found.append(here)
        return found

    def visual(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._where(inputs, lambda token: not token.marker)

    def markers(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._where(inputs, lambda token: token.marker)

    def _where(self, inputs: dict[str, torch.Tensor], wanted: Any) -> torch.Tensor:
        out = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        for b, row in enumerate(self.table(inputs)):
            for column, token in row.items():
                out[b, column] = wanted(token)
        return out


class SmallLlavaNext(Packed):
    def model(self, *, attention: str = "sdpa", seed: int = 0) -> Any:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

        config = LlavaNextConfig(
            vision_config=clip(CLIPVisionConfig),
            text_config=llama(LlamaConfig),
            vision_feature_layer=-2,
            **self.config(),
        )
        return self.build(attention, seed, lambda: LlavaNextForConditionalGeneration(config))


def clip(config: Any) -> Any:
    return config(
        image_size=16, patch_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )


def llama(config: Any) -> Any:
    return config(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
