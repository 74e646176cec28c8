"""What a vision encoder saw, kept as references to its layers' inputs; attention is recomputed when a method asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from mmeff.errors import UnsupportedModel
from mmeff.handle import Handle
from mmeff.kernels import token_scores

Bring = Callable[[Tensor], Tensor]
"""(pictures, patches, C) per patch -> (B, V, C) per visual token of a view."""


class Capture:
    """The arguments of each layer of a vision encoder in the forward that is running, and the projector's input.

    Nothing is kept unless `wanted`. `layers` may lie in an `encoder` of the tower, or in the tower itself.
    """

    def __init__(self, eyes: Any, handle: Handle, *, wanted: bool) -> None:
        self.calls: dict[int, list[tuple[Any, Any]]] = {}
        self.projected: list[Tensor] = []
        self.modules: list[Any] = list(_layers(eyes)) if wanted else []
        self._wanted = wanted
        self._asked = False  # whether the projector runs because a method wants it
        for index, layer in enumerate(self.modules):
            handle.on_remove(layer.register_forward_pre_hook(self._keep(index), with_kwargs=True).remove)

    def watch_projector(self, projector: Any, handle: Handle) -> None:
        """Keep what enters the projector too."""
        if self._wanted:
            handle.on_remove(projector.register_forward_pre_hook(self._keep_features).remove)

    def clear(self) -> None:
        """Let go of what was kept."""
        self.calls.clear()
        self.projected.clear()

    def _keep(self, index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            self.calls.setdefault(index, []).append((args, kwargs))

        return hook

    def _keep_features(self, module: Any, args: Any) -> None:
        if not self._asked:
            self.projected.append(args[0])

    def project(self, projector: Any, features: Tensor) -> Tensor:
        """Run the projector for a method, in the features' dtype: small steps are lost in a model's half precision."""
        weights = {
            name: x.to(features.dtype) for name, x in (*projector.named_parameters(), *projector.named_buffers())
        }
        self._asked = True  # no part of the model's own forward
        try:
            projected: Tensor = torch.func.functional_call(projector, weights, (features,))
        finally:
            self._asked = False
        return projected


def _layers(eyes: Any) -> Any:
    for path in ("encoder.layers", "encoder.layer", "blocks", "layers", "vision_model.encoder.layers"):
        found = eyes
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return found
    raise UnsupportedModel(
        f"the method looks into the vision encoder, and {type(eyes).__name__} has no layers where encoders of known families "
        "have them; choose a method that does not look there, such as FastV or AdaptInfer"
    )


class PatchEncoder:
    """An `EncoderView` of CLIP and SigLIP towers: layers with `layer_norm1` and `self_attn.q_proj`, one sequence per picture.

    Args:
        seen: the captured forward. bring: takes per-patch values to visual tokens. class_token: whether entry 0 of a
            sequence is one. features: (B, V, Dv) per visual token before the projector, or None.
    """

    def __init__(
        self,
        seen: Capture,
        bring: Bring,
        *,
        class_token: bool,
        features: Tensor | None = None,
        projector: Any | None = None,
    ) -> None:
        if not seen.calls:
            raise ValueError(
                "the method looks at the vision encoder, which did not run: features were passed in ready-made; pass "
                "pixel values, or choose a method that does not need the encoder"
            )
        self.layers = len(seen.modules)
        self._seen, self._bring, self._class = seen, bring, class_token
        self._features, self._projector = features, projector

    def received(self, layer: int, rows: Literal["class", "all"]) -> Tensor:
        if rows == "class" and not self._class:
            raise ValueError('this vision encoder has no class token; ask for rows="all"')
        found = []
        for q, k, scale in self._queries_and_keys(layer):
            chosen = q[:, :1] if rows == "class" else q
            seen = token_scores(chosen, k, scale=scale).mean(dim=1) / chosen.shape[1]
            found.append(seen[:, 1:] if self._class else seen)
        return self._bring(torch.cat(found)[..., None])[..., 0]

    def keys(self, layer: int) -> Tensor:
        found = [k.float().mean(dim=2) for _, k, _ in self._queries_and_keys(layer)]
        return self._bring(torch.cat([k[:, 1:] if self._class else k for k in found]))

    def features(self) -> Tensor:
        if self._features is None:
            raise ValueError("the features before the projector were not kept")
        return self._features

    def project(self, features: Tensor) -> Tensor:
        if self._projector is None:
            raise ValueError("this model has no projector that takes single tokens")
        return self._seen.project(self._projector, features)

    def _queries_and_keys(self, layer: int) -> list[tuple[Tensor, Tensor, float]]:
        """(pictures, patches, heads, D) of one layer, for each call of the encoder in this forward."""
        index = layer % self.layers
        module, found = self._seen.modules[index], []
        attention = module.self_attn
        heads = attention.num_heads
        for args, kwargs in self._seen.calls[index]:
            x = module.layer_norm1(args[0] if args else kwargs["hidden_states"])
            q, k = (proj(x).unflatten(-1, (heads, -1)) for proj in (attention.q_proj, attention.k_proj))
            found.append((q, k, q.shape[-1] ** -0.5))
        return found
