"""The sparse core that every family's processor shares, also inside a compiled block and under context parallelism.

A family's processor says how q, k and v come out of its attention module and how the result goes back in; this base says
which calls are sparse. Dense calls go to the stock processor untouched, so they are bit-identical. Within torch.compile the
decision cannot be traced (it depends on the step and the layer), so it is taken inside one operator, to which the
layer is a tensor: all blocks then share one graph.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmeff.diffusion_attn.hosts._denoiser import Session

# Sessions by number, for operators, which take tensors; a session lives as long as its handle's processors do.
_sessions: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Projected:
    """What a family makes of an attention call: q, k, v (B, N, H, D), the video first and the text last.

    rest: whatever the family needs to bring the result back into its own shape.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rest: Any = None


class SparseProcessor:
    """One self-attention layer under a handle; families derive from it and from their stock processor.

    Settings that diffusers writes on a processor while it is installed (attention backend, context parallelism) reach the
    original and outlive us.
    """

    def __init__(self, original: Any, layer: int, session: Session) -> None:
        self.original = original
        self.layer = layer
        self.session = session
        _sessions[id(session)] = session
        self.place = torch.tensor([id(session), layer], dtype=torch.int64, device="cpu")

    @property
    def _attention_backend(self) -> Any:
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self.original._attention_backend = value

    @property
    def _parallel_config(self) -> Any:
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        self.original._parallel_config = value

    # ---------------------------------------------------------------- what a family says

    def tokens(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> int:
        """Tokens of this call, video and text together."""
        raise NotImplementedError

    def obstacle(self, call: dict[str, Any]) -> str | None:
        """Why this call cannot be sparse, or None."""
        return None

    def project(self, attn: Any, hidden_states: Tensor, call: dict[str, Any]) -> Projected:
        """q, k and v of the call: projected, normalised and rotated, as the stock processor does it."""
        raise NotImplementedError

    def finish(self, attn: Any, out: Tensor, projected: Projected, call: dict[str, Any]) -> Any:
        """What the stock processor returns, from the attention output (B, N, H, D), video first and text last."""
        raise NotImplementedError

    # ---------------------------------------------------------------- the call

    def run(self, attn: Any, hidden_states: Tensor, call: dict[str, Any]) -> Any:
        """Serve one call of the processor; `call` holds its other arguments by name."""
        if torch.compiler.is_compiling():
            projected = self.project(attn, hidden_states, call)
            out = torch.ops.mmeff.sparse_video_attention(projected.q, projected.k, projected.v, self.place)
            return self.finish(attn, out, projected, call)
        group = ulysses_group(self._parallel_config)
        split = 1 if group is None else group.size()
        tokens = self.tokens(hidden_states, call.get("encoder_hidden_states")) * split
        obstacle = self.obstacle(call)
        if not self.session.admits(self.layer, hidden_states.device, tokens=tokens, obstacle=obstacle):
            return self.original(attn, hidden_states, **call)
        projected = self.project(attn, hidden_states, call)
        q, k, v = (all_to_heads(x, group) for x in (projected.q, projected.k, projected.v))
        out = all_to_tokens(self.session.attend(self.layer, q, k, v), group)
        return self.finish(attn, out, projected, call)


@torch.library.custom_op("mmeff::sparse_video_attention", mutates_args=())
def sparse_video_attention(q: Tensor, k: Tensor, v: Tensor, place: Tensor) -> Tensor:
    """Attention of one layer of one session, sparse or dense as the session decides. All tensors (B, N, H, D).

    place: (2,) int64 on the CPU, the session's number and the layer.
    """
    number, layer = place.tolist()
    session = _sessions[number]
    if session.admits(layer, q.device, tokens=q.shape[1], obstacle=None):
        return session.attend(layer, q, k, v).contiguous()
    mask = None
    now = session.now
    if now is not None and now.text_valid is not None:
        lengths = q.shape[1] - now.text_len + now.text_valid
        mask = (torch.arange(q.shape[1], device=q.device) < lengths[:, None])[:, None, None]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2).contiguous()


@sparse_video_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, place: Tensor) -> Tensor:
    return q.new_empty(q.shape)


# -------------------------------------------------------------------- context parallelism


def ulysses_group(parallel_config: Any) -> Any:
    """The process group over which Ulysses splits the tokens, or None where the tokens are all here."""
    context = getattr(parallel_config, "context_parallel_config", None)
    return None if context is None or context.ulysses_degree == 1 else context._ulysses_mesh.get_group()


def parallel_obstacle(parallel_config: Any) -> str | None:
    """Why this kind of context parallelism cannot be served, or None."""
    context = getattr(parallel_config, "context_parallel_config", None)
    if context is None:
        return None
    if context.ring_degree > 1:
        return (
            "ring attention shows a device only a part of the keys at a time, and a layout needs them all; use Ulysses"
        )
    if getattr(context, "ulysses_anything", False):
        return "ulysses_anything splits tokens or heads unevenly, which the exchange here does not do"
    return None


def all_to_heads(x: Tensor, group: Any) -> Tensor:
    """(B, N / W, H, D) on each of W processes -> (B, N, H / W, D): all tokens of some heads."""
    if group is None:
        return x
    B, n, H, D = x.shape
    W = group.size()
    parts = x.reshape(B, n, W, H // W, D).permute(2, 1, 0, 3, 4).contiguous()
    return _exchange(parts, group).flatten(0, 1).permute(1, 0, 2, 3)


def all_to_tokens(x: Tensor, group: Any) -> Tensor:
    """Undo all_to_heads."""
    if group is None:
        return x
    B, N, h, D = x.shape
    W = group.size()
    parts = x.reshape(B, W, N // W, h, D).permute(1, 2, 0, 3, 4).contiguous()
    return _exchange(parts, group).permute(2, 1, 0, 3, 4).flatten(2, 3)


def _exchange(parts: Tensor, group: Any) -> Tensor:
    from torch.distributed.nn.functional import all_to_all_single

    return all_to_all_single(torch.empty_like(parts), parts, group=group)  # with a gradient
