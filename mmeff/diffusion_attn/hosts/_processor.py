"""The sparse core that every family's processor shares, also inside a compiled block and under context parallelism.

A family's processor says how q, k and v come out of its attention module and how the result goes back in; this base says
which calls are sparse. Dense calls go to the stock processor untouched, so they are bit-identical. Within torch.compile the
decision cannot be traced (it depends on the step and the layer), so it is taken inside one operator, to which the
layer is a tensor: all blocks then share one graph.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mmeff.diffusion_attn.hosts._denoiser import Session

# Sessions by number, for operators, which take tensors; a session lives as long as its handle's processors do.
_sessions: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Projected:
    """What a family makes of an attention call: q, k, v (B, N, H, D), the video first and the text last.

    Families whose processor says `text_first` give the text first.
    rest: whatever the family needs to bring the result back into its own shape.
    mask: bool, what the stock processor lets be attended, broadcast to (B, H, N, N); None where that is everything. Compiled
    blocks need it for their dense calls.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rest: Any = None
    mask: Tensor | None = None


class SparseProcessor:
    """One self-attention layer under a handle; families derive from it and from their stock processor.

    Settings that diffusers writes on a processor while it is installed (attention backend, context parallelism) reach the
    original and outlive us.

    Class attribute: `text_first`, whether the family's tokens begin with the text. The core then turns them around, because
    some layers are handed joined tokens and only the forward knows where the text ends.
    """

    text_first: ClassVar[bool] = False

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
        """What the stock processor returns, from the attention output (B, N, H, D) in the order of `project`."""
        raise NotImplementedError

    # ---------------------------------------------------------------- the call

    def run(self, attn: Any, hidden_states: Tensor, call: dict[str, Any]) -> Any:
        """Serve one call of the processor; `call` holds its other arguments by name."""
        group = ulysses_group(getattr(self, "_parallel_config", None))  # processors that call SDPA themselves have none
        if torch.compiler.is_compiling():
            if group is not None:
                raise NotImplementedError(
                    "mmeff: sparse attention in compiled blocks does not exchange tokens between devices; use context "
                    "parallelism without compiling, or compile without it."
                )
            if self.obstacle(call) is not None:  # what kind of arguments there are holds for the whole graph
                return self.original(attn, hidden_states, **call)
            projected = self.project(attn, hidden_states, call)
            out = torch.ops.mmeff.sparse_video_attention(
                projected.q, projected.k, projected.v, self.place, projected.mask, self.text_first
            )
            return self.finish(attn, out, projected, call)
        split = 1 if group is None else group.size()
        tokens = self.tokens(hidden_states, call.get("encoder_hidden_states")) * split
        obstacle = self.obstacle(call)
        if group is not None and self.session.method.per_head:
            obstacle = (
                "its pattern differs from head to head, and context parallelism gives each device some of the heads"
            )
        if not self.session.admits(self.layer, hidden_states.device, tokens=tokens, obstacle=obstacle):
            return self.original(attn, hidden_states, **call)
        projected = self.project(attn, hidden_states, call)
        q, k, v = (all_to_heads(x, group) for x in (projected.q, projected.k, projected.v))
        out = all_to_tokens(_attend(self.session, self.layer, q, k, v, self.text_first), group)
        return self.finish(attn, out, projected, call)


def _attend(session: Session, layer: int, q: Tensor, k: Tensor, v: Tensor, text_first: bool) -> Tensor:
    """`Session.attend`, which wants the text last."""
    assert session.now is not None  # nothing is admitted outside a forward
    T = session.now.text_len if text_first else 0
    if T == 0:
        return session.attend(layer, q, k, v)
    q, k, v = (torch.cat((x[:, T:], x[:, :T]), dim=1) for x in (q, k, v))
    out = session.attend(layer, q, k, v)
    return torch.cat((out[:, -T:], out[:, :-T]), dim=1)


@torch.library.custom_op("mmeff::sparse_video_attention", mutates_args=())
def sparse_video_attention(
    q: Tensor, k: Tensor, v: Tensor, place: Tensor, mask: Tensor | None, text_first: bool
) -> Tensor:
    """Attention of one layer of one session, sparse or dense as the session decides. All tensors (B, N, H, D).

    place: (2,) int64 on the CPU, the session's number and the layer. mask: as `Projected.mask`, for a dense call.
    text_first: as `SparseProcessor.text_first`.
    """
    number, layer = place.tolist()
    session = _sessions[number]
    if session.admits(layer, q.device, tokens=q.shape[1], obstacle=None):
        return _attend(session, layer, q, k, v, text_first).contiguous()
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2).contiguous()


@sparse_video_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, place: Tensor, mask: Tensor | None, text_first: bool) -> Tensor:
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
