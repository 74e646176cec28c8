"""Names of weights: the official layouts of NAT, DiNAT, DiNAT_s and the isotropic models, and that of transformers.

Facts of the layouts: an official stage holds the downsampling at its end, ours at the start of the next one; transformers splits
queries, keys and values, and keeps both scales of a layer in one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from mmeff.vision_backbones._timm import State, check_keys, unwrap

# What the official code calls the stages; the isotropic models have blocks there and no stages.
Word = Literal["levels", "layers", "isotropic"]

# transformers' names within a layer, and the official ones
_HF_LAYER = (
    ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."),
    ("attention.output.dense.", "attn.proj."),
    ("attention.self.rpb", "attn.rpb"),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
)
_HF_REST = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.", "levels."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def filter_of(word: Word, family: str) -> Callable[[Mapping[str, Any], nn.Module], State]:
    """The checkpoint filter of a family: files of SHI-Labs, of transformers, or saved by us -> the model's state dict.

    Args: word: what the official code calls the stages; family: the family in words, for the message.
    Raises: ValueError, from the filter, if the file does not fit; see `check_keys`.
    """

    def checkpoint_filter(content: Mapping[str, Any], model: nn.Module) -> State:
        state = unwrap(content)
        renamed = from_official(from_transformers(state), word)
        return check_keys(renamed, model, state, family=family)

    return checkpoint_filter


def from_official(state: State, word: Word) -> State:
    """Rename an official state dict to our names; keys that are ours already stay."""

    def rename(key: str) -> str:
        key = re.sub(r"^patch_embed\.", "stem.", key)
        if word == "isotropic":
            key = re.sub(r"^layers\.(\d+)\.", r"stages.\1.blocks.0.", key)
        else:
            key = re.sub(rf"^{word}\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", key)
            key = re.sub(rf"^{word}\.", "stages.", key)
        return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)

    # the table of indices that ViT-rpb keeps follows from the size of its map
    return {rename(key): value for key, value in state.items() if not key.endswith("relative_position_index")}


def to_official(state: State, word: Word) -> State:
    """Rename our state dict to the official names, for use with the official code."""

    def rename(key: str) -> str:
        key = re.sub(r"^stem\.", "patch_embed.", key)
        if word == "isotropic":
            key = re.sub(r"^stages\.(\d+)\.blocks\.0\.", r"layers.\1.", key)
        else:
            key = re.sub(r"^stages\.(\d+)\.downsample\.", lambda m: f"{word}.{int(m[1]) - 1}.downsample.", key)
            key = re.sub(r"^stages\.", f"{word}.", key)
        return re.sub(r"^head\.fc\.", "head.", key)

    return {rename(key): value for key, value in state.items()}


def from_transformers(state: State) -> State:
    """Rename a state dict of transformers' Dinat (or its former Nat) to the official names; others stay as they are."""
    if not any(re.match(r"(\w+\.)?encoder\.levels\.", key) for key in state):
        return state
    found: State = {}
    for full, value in state.items():
        key = re.sub(r"^(dinat|nat)\.", "", full)
        if layer := re.match(r"encoder\.(levels\.\d+\.)layers\.(\d+\.)(.*)", key):
            block, rest = f"{layer[1]}blocks.{layer[2]}", layer[3]
            if third := re.match(r"attention\.self\.(query|key|value)\.(.*)", rest):
                parts = [state.get(full.replace(f".{third[1]}.", f".{part}.")) for part in ("query", "key", "value")]
                if all(part is not None for part in parts):  # else it is missing, and will be listed
                    found[f"{block}attn.qkv.{third[2]}"] = torch.cat([part for part in parts if part is not None])
            elif rest == "layer_scale_parameters":
                found[block + "gamma1"], found[block + "gamma2"] = value.unbind()
            else:
                theirs, ours = next((pair for pair in _HF_LAYER if rest.startswith(pair[0])), ("", ""))
                found[block + ours + rest.removeprefix(theirs)] = value
        else:
            for pattern, name in _HF_REST:
                key = re.sub(pattern, name, key)
            found[key] = value
    return found
