"""Prompts of different sizes with everything that methods before the language model look at, and NaN wherever nothing is.

Every row has its own tensors, so that a row alone is the same row; padding and absent tokens are NaN.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from .fake_view import FakeEncoder, FakeView, prompt_masks

LAYERS = 4


class Scene:
    """Rows of `visual[i]` visual and `texts[i]` text tokens; the visual ones of row i lie in `frames[i]` frames of equal size.

    `embedded`, `words`, `features`, `keys`, `by_class`, `by_all`, `frame`, `ids`: one entry per row; `keys` and the
    attention once more per encoder layer.
    """

    def __init__(self, visual=(13, 7, 10), texts=(4, 6, 3), frames=(3, 2, 1), *, seed=0, dim=6, wide=5):
        draw = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        self.visual, self.texts = visual, texts
        self.embedded = [random(n, dim) for n in visual]
        self.words = [random(n, dim) for n in texts]
        self.features = [random(n, wide) for n in visual]
        self.keys = [[random(n, 3) for n in visual] for _ in range(LAYERS)]
        self.by_class = [[random(n).softmax(0) for n in visual] for _ in range(LAYERS)]
        self.by_all = [[random(n).softmax(0) for n in visual] for _ in range(LAYERS)]
        self.frame = [torch.arange(n) * f // n for n, f in zip(visual, frames, strict=True)]
        self.ids = [torch.randint(0, 9, (n,), generator=draw) for n in texts]
        self._into, self._out = random(wide, 9), random(9, dim)
        self.digest = torch.tensor([(1 << 62) + 5, -77, 3])[: len(visual)]

    def project(self, features):
        """A projector of two layers; `features` (..., wide)."""
        return torch.tanh(features.double() @ self._into).square() @ self._out

    def view(self, rows=None, *, keep=0.5, layer=0, state=None, dtype=torch.float64):
        """A view of the rows asked for, in a batch of their own."""
        rows = list(range(len(self.visual))) if rows is None else rows
        sizes = [self.visual[b] for b in rows]
        masks = prompt_masks(sizes, [self.texts[b] for b in rows])
        total = masks.real.shape[1]
        embedded = torch.full((len(rows), total, self.embedded[0].shape[1]), math.nan, dtype=torch.float64)
        ids = torch.full((len(rows), total), -1)
        for i, b in enumerate(rows):
            text = self.texts[b]
            embedded[i, total - text - self.visual[b] : total - text] = self.embedded[b]
            embedded[i, total - text :] = self.words[b]
            ids[i, total - text :] = self.ids[b]

        def batch(found, fill=math.nan):
            out = torch.full((len(rows), max(sizes), *found[0].shape[1:]), fill, dtype=found[0].dtype)
            for i, b in enumerate(rows):
                out[i, : sizes[i]] = found[b]
            return out.to(dtype) if out.is_floating_point() else out

        encoder = FakeEncoder(
            layers=LAYERS,
            by_class={i: batch(x) for i, x in enumerate(self.by_class)},
            by_all={i: batch(x) for i, x in enumerate(self.by_all)},
            key={i: batch(x) for i, x in enumerate(self.keys)},
            inputs=batch(self.features),
            projector=self.project,
        )
        view = FakeView(
            visual=masks.visual, real=masks.real, embedded=embedded.to(dtype), frame=batch(self.frame, 0), keep=keep,
            layer=layer, encoder=encoder, ids=ids, state=state,
        )  # fmt: skip
        view.digest = self.digest[rows]
        return view


def kept(method, view):
    """What a method keeps, as a list of places per row; that no absent token is kept, and as many as asked for."""
    keep = method.decide(view).keep
    assert keep.dtype == torch.bool
    assert not (keep & ~view.present).any()
    assert torch.equal(keep.sum(1), torch.minimum(view.counts, view.present.sum(1)))
    return [row.nonzero()[:, 0].tolist() for row in keep]


def largest(scores, count):
    """Places of the `count` largest scores in ascending order, the earlier of equal ones."""
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    return sorted(order[:count])


def shares(count, frame):
    """A count divided among frames by the largest remainders, as a list by frame."""
    sizes = [frame.count(g) for g in range(max(frame) + 1)]
    exact = [Fraction(count * n, sum(sizes)) for n in sizes]
    whole = [math.floor(x) for x in exact]
    order = sorted(range(len(sizes)), key=lambda g: (whole[g] - exact[g], g))
    for g in order[: count - sum(whole)]:
        whole[g] += 1
    return whole


def by_frame(choose, count, frame):
    """Places that `choose(places, count)` takes in each frame with the frame's share."""
    frame = frame.tolist()
    found = []
    for g, k in enumerate(shares(count, frame)):
        places = [i for i, f in enumerate(frame) if f == g]
        found += [places[i] for i in choose(places, k)]
    return sorted(found)


def cosine(a, b):
    """Of two vectors, in plain Python."""
    a, b = a.tolist(), b.tolist()
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
