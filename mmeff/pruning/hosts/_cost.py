"""What a decoder layer costs, counted from its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """Multiply-adds and cache bytes of a decoder layer."""

    width: int
    inner: int
    kv_share: float
    kv_bytes: int  # of one token in one layer

    @classmethod
    def of(cls, text: Any, element: int) -> Cost:
        """From a text config and the bytes of an element."""
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        kv = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return cls(text.hidden_size, text.intermediate_size, kv / text.num_attention_heads, 2 * kv * head * element)

    def prefill(self, tokens: list[float]) -> float:
        """Of layers that run over these numbers of tokens; causal attention: half of the two products with N x N."""
        linear = self.width * (2 * self.width + 2 * self.kv_share * self.width + 3 * self.inner)
        return sum(n * linear + n * n * self.width for n in tokens)

    def cache_bytes(self, tokens: float) -> float:
        """Of this many keys and values, over all layers together."""
        return tokens * self.kv_bytes
