"""Train the tiny VLM: the eye first, then the language model on frozen features, then everything together.

The whole recipe is `VlmRecipe`; budgets are steps. Stage 1 gives the vision tower five auxiliary heads (they are dropped
afterwards). Stages 2 and 3 pack many questions behind one picture: every question sees the picture and itself, at the
positions it would have alone, so one pass trains what many single-turn passes would. In half of its batches the last stage
shows the language model only some tokens, those on objects first, because otherwise it counts objects by the share of tokens
they cover. The vision tower does not learn from these batches: with random dropping and a trained tower every token soon
carries the whole picture, and pruning costs nothing whatever is dropped. The model has been trained to tolerate pruning
that keeps objects, and its card says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmeff import training
from mmeff.tiny import scenes, vlm_model

SEGMENT = 10  # tokens of one packed question with its answer and end mark
CHECKPOINT_EVERY = 200  # steps
Policy = Callable[[Any, torch.Tensor, np.random.Generator], torch.Tensor | None]

FIRST = 1 + vlm_model.VISUAL  # position of a question's first token
EOS, PAD = vlm_model.SPECIAL.index("</s>"), vlm_model.SPECIAL.index("<pad>")


TOWER_JOIN_STEPS = (
    2600  # of stage 3 behind a backbone, whose tokens the language model learns to read later than CLIP's
)


@dataclass(frozen=True, kw_only=True)
class VlmRecipe:
    """Everything that decides the weights."""

    seed: int = 1
    see_steps: int = 1000  # stage 1: vision tower with auxiliary heads
    read_steps: int = 500  # stage 2: language model on frozen features, a quarter of the tokens
    join_steps: int = 1300  # stage 3: everything; in half of the batches some tokens, without the tower
    batch: int = 16
    questions: int = 12  # packed behind one picture
    lr: float = 3e-3
    join_lr: float = 1.2e-3
    warmup: int = 40
    constant: float = 0.5  # fraction of a stage before its linear decay
    read_tokens: int = 36
    join_tokens: tuple[int, ...] = (18, 36, 72)
    auxiliary: float = 0.2  # weight of the stage-1 losses in stage 3
    tower: str = ""  # a backbone in place of CLIP


class Eye(nn.Module):
    """Auxiliary heads of stage 1 over the hidden states of a CLIP vision tower."""

    def __init__(self) -> None:
        super().__init__()
        dim = vlm_model.DIM
        self.colour = nn.Linear(dim, len(scenes.COLOURS) + 1)
        self.shape = nn.Linear(dim, len(scenes.SHAPES) + 1)
        self.masks = nn.ModuleList(nn.Linear(dim, vlm_model.PATCH**2) for _ in range(2))
        self.place = nn.Linear(dim, 2)
        self.centre = nn.Linear(dim, 1)
        self.whole = nn.ModuleList(nn.Linear(dim, len(scenes.COLOURS) * len(scenes.SHAPES)) for _ in range(2))

    def forward(
        self, states: tuple[torch.Tensor, ...], truth: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The summed loss, and accuracies for the log."""
        feature = states[-2]
        patches = feature[:, 1:]
        colour, shape = self.colour(patches), self.shape(patches)
        loss = F.cross_entropy(colour.flatten(0, 1), truth["colour"].flatten())
        loss = loss + 2 * F.cross_entropy(shape.flatten(0, 1), truth["shape"].flatten())
        for head, state in zip(self.masks, (states[1], feature), strict=True):
            loss = loss + F.binary_cross_entropy_with_logits(head(state[:, 1:]), truth["mask"])
        loss = loss + F.mse_loss(self.place(patches), truth["place"].expand(len(patches), -1, -1))
        few = torch.tensor(5.0)
        loss = loss + F.binary_cross_entropy_with_logits(self.centre(patches)[..., 0], truth["centre"], pos_weight=few)
        for head, state in zip(self.whole, (feature, states[-1]), strict=True):
            loss = loss + F.binary_cross_entropy_with_logits(head(state[:, 0]), truth["whole"])
        real = truth["shape"] < len(scenes.SHAPES)
        accuracy = {
            "patch_colour": (colour.argmax(-1) == truth["colour"])[real].float().mean().item(),
            "patch_shape": (shape.argmax(-1) == truth["shape"])[real].float().mean().item(),
        }
        return loss, accuracy


def patch_truth(batch: scenes.Scenes) -> dict[str, torch.Tensor]:
    """Targets of the auxiliary heads, from the scenes' own geometry."""
    b, p = len(batch), vlm_model.PATCH
    side = batch.owner.shape[1] // p
    owner = (
        torch.from_numpy(batch.owner).reshape(b, side, p, side, p).permute(0, 1, 3, 2, 4).reshape(b, side * side, p * p)
    )
    share = torch.stack([(owner == o).float().mean(-1) for o in range(batch.colour.shape[1])], dim=-1)  # (B, V, O)
    most, which = share.max(dim=-1)
    on = most > 0.3
    colours = torch.from_numpy(batch.colour).gather(1, which)
    shapes = torch.from_numpy(batch.shape).gather(1, which)
    axis = torch.linspace(-1, 1, side)
    centre = torch.zeros(b, side * side)
    whole = torch.zeros(b, len(scenes.COLOURS) * len(scenes.SHAPES))
    for i in range(b):
        n = int(batch.count[i])
        cell = (batch.centre[i, :n] // p).astype(int)
        centre[i, cell[:, 0] * side + cell[:, 1]] = 1.0
        whole[i, batch.colour[i, :n] * len(scenes.SHAPES) + batch.shape[i, :n]] = 1.0
    return {
        "colour": torch.where(on, colours, len(scenes.COLOURS)),
        "shape": torch.where(on, shapes, len(scenes.SHAPES)),
        "mask": (owner >= 0).float(),
        "place": torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(1, side * side, 2),
        "centre": centre,
        "whole": whole,
        "object": on.float(),
        "owner": which,
    }


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Questions of a batch as tokens: ids (B, Q, SEGMENT), answer mask of the same shape, and the questions themselves."""

    ids: torch.Tensor
    answer: torch.Tensor
    questions: list[list[scenes.Question]]


def pack(batch: Any, rng: np.random.Generator, count: int, words: Any, *, ask: Any = scenes.ask) -> Packed:
    """Draw and tokenise `count` questions for every scene, or whatever else `ask` knows how to ask about."""
    questions = [ask(batch, b, rng, count) for b in range(len(batch))]
    vocabulary = words.get_vocab()
    ids = torch.full((len(batch), count, SEGMENT), PAD)
    answer = torch.zeros(len(batch), count, SEGMENT, dtype=torch.bool)
    for b, row in enumerate(questions):
        for q, question in enumerate(row):
            asked = [vocabulary[w] for w in question.text.split()]
            said = [vocabulary[w] for w in question.answer.split()] + [EOS]
            ids[b, q, : len(asked) + len(said)] = torch.tensor(asked + said)
            answer[b, q, len(asked) : len(asked) + len(said)] = True
    return Packed(ids=ids, answer=answer, questions=questions)


def read(net: Any, features: torch.Tensor, packed: Packed, keep: torch.Tensor | None) -> torch.Tensor:
    """Logits (B, Q, SEGMENT, vocabulary) that predict the token after each packed token.

    Args:
        features: projected visual tokens (B, V, C).
        keep: original indices (B, K) of the visual tokens that the language model sees, sorted; None keeps all. Kept tokens
            keep their original positions.
    """
    batch = len(packed.ids)
    places = torch.arange(vlm_model.VISUAL).expand(batch, -1) if keep is None else keep
    if keep is not None:
        features = features.gather(1, keep[..., None].expand(-1, -1, features.shape[-1]))
    first = net.model.language_model.embed_tokens(torch.full((batch, 1), vlm_model.SPECIAL.index("<s>")))
    places = torch.cat([torch.zeros(batch, 1, dtype=torch.long), places + 1], dim=1)
    return read_behind(net, torch.cat([first, features], dim=1), places, packed, first=FIRST)[0]


def read_behind(
    net: Any, prefix: torch.Tensor, places: torch.Tensor, packed: Packed, *, first: int
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Read packed questions behind a common prefix: each sees the prefix and itself, at the positions it would have alone.

    Args:
        prefix: embeddings (B, P, C) in front of the questions; places: their positions (B, P), rising.
        first: position of a question's first token.
    Returns:
        logits (B, Q, SEGMENT, vocabulary), and the prefix's hidden states (B, P, C) before and after every layer.
    """
    batch, questions, _ = packed.ids.shape
    asked = net.model.language_model.embed_tokens(packed.ids.flatten(1))
    length = prefix.shape[1]
    row = torch.arange(length + questions * SEGMENT)
    segment = torch.where(row < length, -1, (row - length) // SEGMENT)
    visible = (row[:, None] >= row[None]) & ((segment[None] == -1) | (segment[:, None] == segment[None]))
    positions = (first + torch.arange(SEGMENT)).repeat(questions).expand(batch, -1)
    out = net.model.language_model(
        inputs_embeds=torch.cat([prefix, asked], dim=1),
        attention_mask=visible[None, None].expand(batch, 1, -1, -1),
        position_ids=torch.cat([places, positions], dim=1),
        use_cache=False,
        output_hidden_states=True,
    )
    logits = net.lm_head(out.last_hidden_state[:, length:]).unflatten(1, (questions, SEGMENT))
    return logits, tuple(state[:, :length] for state in out.hidden_states)


def answer_loss(logits: torch.Tensor, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy over answer tokens, and exact match (B, Q) of the whole answer under greedy decoding."""
    target, wanted = packed.ids[:, :, 1:], packed.answer[:, :, 1:]
    scores = logits[:, :, :-1]
    loss = F.cross_entropy(scores[wanted], target[wanted])
    right = (scores.argmax(-1) == target) | ~wanted
    return loss, right.all(-1)


def some_tokens(on_object: torch.Tensor, count: int, rng: np.random.Generator, *, bias: float) -> torch.Tensor:
    """Indices (B, count), sorted, of visual tokens: random with `bias` 0, object tokens first with `bias` 1."""
    noise = torch.from_numpy(rng.uniform(size=on_object.shape)).float()
    return (noise + bias * on_object).topk(count, dim=1).indices.sort(dim=1).values


def random_tokens(count: int) -> Policy:
    """A policy for `evaluate`: `count` visual tokens, drawn evenly."""

    def draw(net: Any, pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        return some_tokens(torch.zeros(len(pixels), vlm_model.VISUAL), count, rng, bias=0.0)

    return draw


def see(net: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The vision tower's hidden states (B, 1 + V, C). A backbone has one, with the mean in place of a class token."""
    states: tuple[torch.Tensor, ...] = net.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    if net.config.vision_feature_select_strategy == "default":
        return states
    state = torch.cat([states[-1].mean(dim=1, keepdim=True), states[-1]], dim=1)
    return state, state


def look(net: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Projected visual tokens (B, V, C) and the vision tower's hidden states."""
    states = see(net, pixels)
    return net.model.multi_modal_projector(states[-2][:, 1:]), states


def _stage(recipe: VlmRecipe, step: int) -> tuple[str, int, int]:
    """The stage of a step, the step inside it, and its length."""
    for name, length in (("see", recipe.see_steps), ("read", recipe.read_steps), ("join", recipe.join_steps)):
        if step < length:
            return name, step, length
        step -= length
    raise IndexError(step)


def _optimizer(net: Any, eye: Eye, stage: str) -> training.Optimizer:
    """Fresh optimisers for a stage, over what the stage trains."""
    vision = list(net.model.vision_tower.named_parameters(prefix="model.vision_tower"))
    rest = [(n, p) for n, p in net.named_parameters() if not n.startswith("model.vision_tower")]
    heads = list(eye.named_parameters(prefix="eye"))
    named = {"see": vision + heads, "read": rest, "join": vision + rest + heads}[stage]
    matrices, others = training.split_matrices(named, lambda n: ".layers." in n or ".blocks." in n or "projector" in n)
    if not matrices:  # FocalNet has convolutions of one pixel in their place
        return training.Optimizer([torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0)])
    return training.MuonWithAdamW(matrices, others)


def train(
    recipe: VlmRecipe, folder: str | Path, *, progress: Callable[[int, int, dict[str, float]], None] | None = None
) -> Any:
    """Run or resume a training in `folder`; returns the trained LLaVA model.

    Raises:
        ValueError: the folder holds a run of another recipe.
    """
    settings = {name: value for name, value in asdict(recipe).items() if name != "tower" or value}
    run = training.Run(folder, {"kind": "tiny-vlm", **settings})
    torch.manual_seed(recipe.seed)
    net, eye, words = vlm_model.model(tower=recipe.tower).train(), Eye(), vlm_model.tokenizer()
    start, steps = 0, recipe.see_steps + recipe.read_steps + recipe.join_steps
    optimizer, stage_now = None, None
    if (stored := run.load()) is not None:
        tensors, state = stored
        net.load_state_dict(training.without_prefix("net", tensors))
        eye.load_state_dict(training.without_prefix("eye", tensors))
        start, stage_now = state["step"], state["stage"]
        optimizer = _optimizer(net, eye, stage_now)
        optimizer.load_tensors(tensors)
    window: list[dict[str, float]] = []
    for step in range(start, steps):
        stage, inner, length = _stage(recipe, step)
        if stage != stage_now or optimizer is None:
            optimizer, stage_now = _optimizer(net, eye, stage), stage
        batch = scenes.sample(scenes.TRAIN_SEED + recipe.seed, step, recipe.batch)
        pixels, truth = vlm_model.pixels(batch.images), patch_truth(batch)
        row: dict[str, float] = {}
        if stage == "see":
            states = see(net, pixels)
            loss, row = eye(states, truth)
        else:
            draw = training.rng(recipe.seed, step)
            packed = pack(batch, draw, recipe.questions, words)
            some = stage == "read" or inner % 2 == 1
            with torch.set_grad_enabled(not some):
                states = see(net, pixels)
            features = net.model.multi_modal_projector(states[-2][:, 1:])
            keep = None
            if some:
                count = recipe.read_tokens if stage == "read" else int(draw.choice(recipe.join_tokens))
                keep = some_tokens(truth["object"], count, draw, bias=1.0)
            loss, right = answer_loss(read(net, features, packed, keep), packed)
            row = {"exact": right.float().mean().item()}
            if not some:
                extra, _ = eye(states, truth)
                loss = loss + recipe.auxiliary * extra
        loss.backward()
        lr = training.warmup_constant_linear(
            inner, steps=length, lr=recipe.join_lr if stage == "join" else recipe.lr, warmup=recipe.warmup,
            constant=recipe.constant,
        )  # fmt: skip
        optimizer.step(lr)
        window.append({"loss": loss.item(), **row})
        if (step + 1) % 50 == 0 or step + 1 == steps:
            mean = {k: float(np.mean([w[k] for w in window if k in w])) for k in window[-1]}
            window.clear()
            run.log(step=step + 1, stage=stage, lr=lr, **mean)
            if progress:
                progress(step + 1, steps, mean)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            tensors = training.with_prefix("net", net.state_dict()) | training.with_prefix("eye", eye.state_dict())
            run.save(tensors | optimizer.tensors(), step=step + 1, stage=stage)
        if (step + 1) % 400 == 0 and stage == "join":
            score = evaluate(net, seed=scenes.GATE_SEED, count=512)
            score["random"] = evaluate(
                net, seed=scenes.GATE_SEED, count=512, policy=random_tokens(vlm_model.VISUAL // 4)
            )["exact_match"]
            run.log(step=step + 1, quick=score)
            if progress:
                progress(step + 1, steps, score)
            net.train()
    return net.eval()


@torch.no_grad()
def evaluate(net: Any, *, seed: int, count: int, policy: Policy | None = None) -> dict[str, float]:
    """Exact match on at least `count` questions of a split (whole batches of 128), overall and per kind.

    Args:
        policy: maps (model, pixels (B, 3, 96, 96), generator) to the visual tokens (B, K) that the language model is given.
    """
    net = net.eval()
    words = vlm_model.tokenizer()
    hits: dict[str, list[float]] = {kind: [] for kind in scenes.KINDS}
    per_scene, size = 4, 32
    for index in range(-(-count // (per_scene * size))):
        batch = scenes.sample(seed, index, size)
        draw = training.rng(seed, index)
        packed = pack(batch, draw, per_scene, words)
        pixels = vlm_model.pixels(batch.images)
        features, _ = look(net, pixels)
        keep = policy(net, pixels, draw) if policy else None
        _, right = answer_loss(read(net, features, packed, keep), packed)
        for row, answers in zip(right, packed.questions, strict=True):
            for hit, question in zip(row, answers, strict=True):
                hits[question.kind].append(float(hit))
    every = [h for values in hits.values() for h in values]
    return {
        "questions": len(every),
        "exact_match": float(np.mean(every)),
        **{k: float(np.mean(v)) for k, v in hits.items() if v},
    }
