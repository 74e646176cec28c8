"""The tiny video model: a stock `WanPipeline` of 1.1 M parameters, and the position table that its patch embedding needs.

Wan places tokens by relative rotary embedding only. At the noisiest steps all tokens look alike, so a model this small
cannot learn within minutes where "left" is. It is therefore trained with fixed coordinate features behind a linear map,
added to the patch embedding. After training that product is one tensor per token position: the position table. It lies
beside the transformer's weights, and `attach_position_table` adds it through a forward hook, so that the pipeline and the
transformer stay the stock classes. Loaded without the table the pipeline runs, but draws nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from mmeff.tiny import clips, codec

TABLE_FILE = "position_table.safetensors"
GRID = (9, 6, 6)  # latent frames, rows and columns of tokens
TEXT_DIM = 32
TEXT_TOKENS = 6  # five words and the end mark
SHIFT = 3.0


def tokenizer() -> Any:
    """A word-level tokenizer over the grammar of `clips.prompt`; unknown words become <unk>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "moving", *clips.COLOURS, *clips.SHAPES, *clips.DIRECTIONS]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def text_encoder(seed: int = 7) -> Any:
    """A stock UMT5 encoder whose layers are silent: every word maps to one fixed random vector of RMS 2."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(tokenizer()), d_model=TEXT_DIM, d_kv=16, d_ff=32, num_layers=1, num_heads=2, num_decoder_layers=1
    )
    encoder = UMT5EncoderModel(config).eval()
    with torch.no_grad():
        vectors = torch.randn(config.vocab_size, TEXT_DIM, generator=torch.Generator().manual_seed(seed))
        encoder.shared.weight.copy_(vectors)
        for block in encoder.encoder.block:
            block.layer[0].SelfAttention.o.weight.zero_()
            block.layer[1].DenseReluDense.wo.weight.zero_()
        encoder.encoder.final_layer_norm.weight.fill_(2.0)
    return encoder


@torch.no_grad()
def embed_prompts(prompts: list[str], encoder: Any, words: Any) -> torch.Tensor:
    """Text features (B, TEXT_TOKENS + 1, TEXT_DIM): the words, zeros behind them, and one zero vector that stands for
    all further padding of the pipeline."""
    batch = words(prompts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
    states = encoder(batch.input_ids, batch.attention_mask).last_hidden_state
    states = states * batch.attention_mask[..., None]
    return F.pad(states, (0, 0, 0, 1))


def transformer() -> Any:
    """The untrained Wan transformer: 4 layers, 4 heads of 32, patches of 1 x 4 x 4 latents."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 4, 4),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=codec.LATENT_CHANNELS,
        out_channels=codec.LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=384,
        num_layers=4,
    )


def scheduler() -> Any:
    """Euler steps on the flow-matching path, with the shift that training used."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def coordinates(grid: tuple[int, int, int] = GRID) -> torch.Tensor:
    """Fixed features (F, H, W, 25) of a token's place: t, y, x, their waves, t*x and t*y, and travelling waves.

    The travelling waves make "moves to the left" a linear feature; as a product of direction, time and place it is learned
    orders of magnitude more slowly.
    """
    axes = [torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in grid]
    t, y, x = torch.meshgrid(*axes, indexing="ij")
    features = [t, y, x]
    for axis in (t, y, x):
        features += [torch.sin(torch.pi * axis), torch.cos(torch.pi * axis)]
    for axis in (y, x):
        features += [torch.sin(2 * torch.pi * axis), torch.cos(2 * torch.pi * axis)]
    features += [torch.sin(2 * torch.pi * t), torch.cos(2 * torch.pi * t), t * x, t * y]
    for axis in (x, y):
        for sign in (1, -1):
            phase = torch.pi / 2 * (axis + sign * t)
            features += [torch.sin(phase), torch.cos(phase)]
    return torch.stack(features, dim=-1)


class PositionTable(nn.Module):
    """Adds a learned vector per token position to the output of a patch embedding, (B, C, F, H, W).

    A grid other than the table's own is served by trilinear interpolation of the table: position interpolation, since the
    coordinates behind the table run from -1 to 1 over whatever length. Recomputing the features on the new grid instead
    (they have full rank, so the table gives their linear map back) changes nothing that can be measured: velocity loss
    0.0637 against 0.0642 on clips of twice the length, 0.143 against 0.142 on four times.
    """

    table: torch.Tensor

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)  # (C, F, H, W)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        table = self.table
        if table.shape[1:] != patches.shape[2:]:
            resized = F.interpolate(table[None].float(), size=patches.shape[2:], mode="trilinear", align_corners=True)
            table = resized[0]
        return patches + table.to(patches)


def attach_position_table(model: Any, table: torch.Tensor) -> Any:
    """Add the table to a Wan transformer's patch embedding; returns the removable hook handle."""
    add = PositionTable(table)

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return add.to(output.device)(output)

    model.mmeff_position_table = table  # a plain attribute, no part of the state dict: `save_table` of a tuned model
    return model.patch_embedding.register_forward_hook(hook)


def attach_if_present(pipeline: Any, folder: str | Path) -> bool:
    """Attach the table that lies beside the transformer's weights, if one does; True when it did."""
    path = Path(folder) / "transformer" / TABLE_FILE
    if not path.is_file():
        return False
    attach_position_table(pipeline.transformer, load_file(path)["table"])
    return True


def save_table(folder: str | Path, table: torch.Tensor) -> None:
    """Write the table beside the transformer's weights as float16."""
    save_file({"table": table.to(torch.float16).contiguous()}, Path(folder) / "transformer" / TABLE_FILE)
