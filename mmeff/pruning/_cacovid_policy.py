"""The policy network of CaCoVID: which frames, and which tokens of each, the language model would miss.

One decoder layer, a copy of the language model's first, reads the whole prompt without a causal mask, so that video tokens
see the question behind them. Two small heads rank what comes out: one every video token, one the mean of each frame.

A folder of a policy holds `config.json` and `policy.safetensors`; nothing is unpickled.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG, WEIGHTS = "config.json", "policy.safetensors"
KIND = "cacovid-policy"
SHRINK = (2, 4, 8, 16)  # the heads' layers have d/2, d/4, d/8, d/16 outputs, then 2
PROBE_ERROR = 1e-3  # relative, of a copied layer against its original in float32


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Sizes of a policy, and the model whose prompts it was trained on."""

    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float  # of the RMS norms
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    trained_on: str = ""

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str}
        for field in dataclasses.fields(self):
            value: Any = getattr(self, field.name)
            kind = kinds[str(field.type)]
            number = kind in (int, float)
            if type(value) is not kind or (number and value <= 0):
                rule = f"a positive {field.type}" if number else f"a {field.type}"
                raise ValueError(f"PolicyConfig.{field.name} must be {rule}, got {value!r}")
        if self.hidden_size < SHRINK[-1]:
            raise ValueError(
                f"PolicyConfig.hidden_size must be at least {SHRINK[-1]}, because the heads shrink it by that, got "
                f"{self.hidden_size}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"PolicyConfig.heads must be a multiple of kv_heads={self.kv_heads}, got {self.heads}")


class Attention(nn.Module):
    """Grouped-query attention of every real token to every real token; names and shapes as in Llama, Qwen2 and Qwen3."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        width, inner, outer = config.hidden_size, config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(width, inner, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, outer, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, outer, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner, width, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, config.eps)
            self.k_norm = nn.RMSNorm(config.head_dim, config.eps)
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor, real: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (_rotate(q, cos, sin), _rotate(k, cos, sin), v))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :], enable_gqa=True)
        return self.o_proj(seen.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(width, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A decoder layer that is not causal. Its parameters are named as a decoder layer's, so weights are copied by name."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.eps)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, real: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), real, cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Policy(nn.Module):
    """The layer, a norm, and the two heads. Fresh heads rank almost nothing: all logits are small."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = Layer(config)
        self.norm = nn.RMSNorm(config.hidden_size, config.eps)
        self.token_head = _head(config.hidden_size)
        self.frame_head = _head(config.hidden_size)

    def forward(
        self, hidden: Tensor, real: Tensor, rotary: tuple[Tensor, Tensor], slots: Tensor, present: Tensor, frame: Tensor,
        frames: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Logits of video tokens (B, V) and of frames (B, `frames`); those of absent tokens mean nothing.

        Args:
            hidden: (B, S, D) the prompt's input embeddings. real: (B, S) bool. rotary: cos and sin, (1 or B, S, head dim).
            slots: (B, V) where the video tokens lie among the S. present: (B, V) bool. frame: (B, V) from 0.
        """
        cos, sin = (x.to(hidden.dtype) for x in rotary)
        hidden = hidden.masked_fill(~real[..., None], 0.0)  # a NaN there would come through a weight of 0
        out = self.layer(hidden, real, cos, sin)
        video = out.gather(1, slots[..., None].expand(-1, -1, out.shape[-1])) * present[..., None]
        at = frame.masked_fill(~present, 0)[..., None].expand_as(video)
        sums = video.new_zeros(len(video), frames, video.shape[-1]).scatter_add(1, at, video)
        sizes = sums.new_zeros(len(video), frames).scatter_add(1, at[..., 0], present.to(sums.dtype))
        means = sums / sizes.clamp(min=1)[..., None]
        tokens, whole = self.token_head(self.norm(video)), self.frame_head(self.norm(means))
        return tokens[..., 1] - tokens[..., 0], whole[..., 1] - whole[..., 0]

    @classmethod
    def from_layer(cls, decoder_layer: nn.Module, config: Any, *, trained_on: str = "") -> Policy:
        """A fresh policy whose layer has the weights of a language model's own, in float32.

        Args: decoder_layer: a decoder layer of a Llama, Qwen2 or Qwen3, usually the first. config: its text config.
        Raises: ValueError for a layer with other parts, or that computes something else with them.
        """
        attention: Any = getattr(decoder_layer, "self_attn", None)
        weights = dict(decoder_layer.state_dict())
        who = type(decoder_layer).__name__
        if attention is None or "self_attn.q_proj.weight" not in weights or "mlp.gate_proj.weight" not in weights:
            raise ValueError(
                f"the policy starts from a decoder layer made like Llama's, with self_attn.q_proj and mlp.gate_proj, got {who}"
            )
        sizes = PolicyConfig(
            hidden_size=int(config.hidden_size),
            intermediate_size=int(weights["mlp.gate_proj.weight"].shape[0]),
            heads=int(config.num_attention_heads),
            kv_heads=int(config.num_key_value_heads),
            head_dim=int(attention.head_dim),
            eps=float(config.rms_norm_eps),
            qkv_bias="self_attn.q_proj.bias" in weights,
            output_bias="self_attn.o_proj.bias" in weights,
            mlp_bias="mlp.gate_proj.bias" in weights,
            qk_norm="self_attn.q_norm.weight" in weights,
            trained_on=trained_on,
        )
        policy = cls(sizes)
        if set(weights) != set(policy.layer.state_dict()):
            odd = sorted(set(weights) ^ set(policy.layer.state_dict()))
            raise ValueError(
                f"the policy's layer and {who} differ in {', '.join(odd)}; use a Llama, Qwen2 or Qwen3 model"
            )
        policy.layer.load_state_dict({k: v.detach().float().cpu() for k, v in weights.items()})
        _check_copy(policy.layer, decoder_layer, sizes)
        return policy

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `policy.safetensors` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        save_file(tensors, folder / WEIGHTS)
        text = json.dumps({"kind": KIND, **dataclasses.asdict(self.config)}, indent=1)
        (folder / CONFIG).write_text(text + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Policy:
        """The policy of a folder, on the CPU.

        Raises: FileNotFoundError where a file is missing; ValueError where they are no policy, or do not fit each other.
        """
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"a policy's folder holds {CONFIG} and {WEIGHTS}, but {folder} has no {name}; train one with "
                    "`mmeff train cacovid`"
                )
        stored = json.loads((folder / CONFIG).read_text())
        known = {f.name for f in dataclasses.fields(PolicyConfig)}
        if not isinstance(stored, dict) or stored.pop("kind", None) != KIND or set(stored) != known:
            raise ValueError(
                f"{folder / CONFIG} is not the config of a CaCoVID policy (kind {KIND!r} with {', '.join(sorted(known))})"
            )
        policy = cls(PolicyConfig(**stored))
        tensors, wanted = load_file(folder / WEIGHTS), policy.state_dict()
        odd = [
            k
            for k in sorted({*tensors, *wanted})
            if getattr(tensors.get(k), "shape", None) != getattr(wanted.get(k), "shape", None)
        ]
        if odd:
            raise ValueError(
                f"{folder / WEIGHTS} does not fit {CONFIG}: other weights, or other shapes, in {', '.join(odd[:5])}"
            )
        policy.load_state_dict(tensors)
        return policy.eval()


def _head(width: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    sizes = [width, *(width // s for s in SHRINK)]
    for before, after in pairwise(sizes):
        parts += [nn.Linear(before, after), nn.SiLU()]
    parts.append(nn.Linear(sizes[-1], 2))
    for part in parts:
        if isinstance(part, nn.Linear):
            # the library's default shrinks what passes by a factor per layer, and five in a row would leave no signal
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            nn.init.zeros_(part.bias)
    with torch.no_grad():
        parts[-1].weight.mul_(0.1)  # type: ignore[operator]
    return nn.Sequential(*parts)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, S, H, D) by cos and sin (1 or B, S, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat([-second, first], dim=-1) * sin[:, :, None]


@torch.no_grad()
def _check_copy(copied: Layer, original: nn.Module, sizes: PolicyConfig) -> None:
    """Parts of the same names may compute something else (a norm of 1 + weight, scaled residuals): compare both on one token."""
    own = copy.deepcopy(original).to(device="cpu", dtype=torch.float32)
    x = torch.randn(1, 1, sizes.hidden_size, generator=torch.Generator().manual_seed(0))
    cos, sin = torch.ones(1, 1, sizes.head_dim), torch.zeros(1, 1, sizes.head_dim)
    ours = copied(x, torch.ones(1, 1, dtype=torch.bool), cos, sin)
    found: Any = own(x, position_embeddings=(cos, sin))
    theirs = found[0] if isinstance(found, tuple) else found
    off = float((ours - theirs).norm() / (theirs - x).norm().clamp(min=1e-12))
    scaling = float(getattr(original.self_attn, "scaling", sizes.head_dim**-0.5))  # one token alone does not show it
    if off > PROBE_ERROR or abs(scaling * sizes.head_dim**0.5 - 1) > 1e-6:
        raise ValueError(
            f"the policy's layer computes what Llama's does, and {type(original).__name__} does not (relative difference "
            f"{off:.2g}, attention scale {scaling:.4g}); use a Llama, Qwen2 or Qwen3 model"
        )
