"""Train the tiny video VLM from the tiny image VLM: its eye on small frames, then the language model on motion.

The vision tower sees single frames, so the language model must compare them. From answers alone it learns that very slowly.
Two things help. The first clips hold one object. And while it trains, a linear head on the visual tokens behind the second
layer says how far the object under each token has come since the first frame, and which way it moves; the heads are dropped
afterwards. `VideoVlmRecipe` is the whole recipe, budgets are steps:

    see      the tower on single frames with the auxiliary heads of the image model
    follow   the language model on clips of one object, 64 of 288 tokens, those on objects first
    read     the same on clips of one to three objects
    join     all tokens in half of the batches; in the others only some, those on objects first, so that nothing is read
             from the share of tokens that an object covers

The tower stays as `see` leaves it: the gate is passed without training it to the end, at less cost.
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
from mmeff.tiny import data_folder, motions, video_vlm_model, vlm_model
from mmeff.tiny.export import digest
from mmeff.tiny.train_vlm import (
    Eye,
    Packed,
    Policy,
    answer_loss,
    pack,
    patch_truth,
    read_behind,
    some_tokens,
)

STAGES = ("see", "follow", "read", "join")
CHECKPOINT_EVERY, LOG_EVERY, EVALUATE_EVERY = 200, 50, 400
SETTLED = 3  # frames before the direction of motion is asked of a visual token


@dataclass(frozen=True, kw_only=True)
class VideoVlmRecipe:
    """Everything that decides the weights, beside those of the image model it starts from."""

    seed: int = 1
    see_steps: int = 300  # the tower on single frames
    follow_steps: int = 400  # one object
    read_steps: int = 1000  # one to three objects
    join_steps: int = 500  # all tokens in every other batch
    batch: int = 8  # clips
    whole_batch: int = 6  # clips of a batch with all tokens
    see_frames: int = 6  # of a clip, in stage 1
    questions: int = 8  # packed behind one clip
    lr: float = 3e-3
    join_lr: float = 1.2e-3
    warmup: int = 40
    constant: float = 0.6  # fraction of a stage before its linear decay
    read_tokens: int = 64  # of 288
    join_tokens: tuple[int, ...] = (36, 72, 144)
    motion: float = 0.5  # weight of the motion heads
    motion_layer: int = 2  # language layers in front of the motion heads

    def steps(self) -> dict[str, int]:
        """Steps of every stage, in order."""
        return {stage: getattr(self, f"{stage}_steps") for stage in STAGES}


class Motion(nn.Module):
    """What a visual token must know of the object under it: how far it has come since the first frame, and its motion."""

    def __init__(self) -> None:
        super().__init__()
        self.come = nn.Linear(vlm_model.DIM, 2)
        self.way = nn.Linear(vlm_model.DIM, len(motions.MOTIONS))

    def forward(self, hidden: torch.Tensor, truth: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
        """The loss over tokens on objects, hidden (B, K, C), and the share of right directions in settled frames."""
        on = truth["motion"] >= 0
        come = F.mse_loss(self.come(hidden[on]), truth["come"][on])
        settled = on & (truth["frame"] >= SETTLED)
        way, wanted = self.way(hidden[settled]), truth["motion"][settled]
        return 4 * come + F.cross_entropy(way, wanted), (way.argmax(-1) == wanted).float().mean().item()


def motion_truth(batch: motions.Motions, seen: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Targets of `Motion` for all 288 visual tokens; motion is -1 off objects, distances are in half frames.

    Args:
        seen: `patch_truth` of all frames of the batch.
    """
    clips = len(batch)

    def tokens(values: torch.Tensor) -> torch.Tensor:
        return values.reshape(clips, video_vlm_model.VISUAL, *values.shape[2:])

    on, owner = tokens(seen["object"]) > 0, tokens(seen["owner"])
    frame = torch.arange(motions.FRAMES).repeat_interleave(video_vlm_model.PER_FRAME).expand(clips, -1)
    moved = torch.from_numpy(batch.path - batch.path[:, :, :1]) / (motions.SIZE / 2)  # (B, O, F, 2)
    return {
        "motion": torch.where(on, torch.from_numpy(batch.motion).gather(1, owner), -1),
        "come": moved[torch.arange(clips)[:, None], owner, frame].float(),
        "frame": frame,
        "object": on.float(),
    }


def look(net: Any, videos: np.ndarray) -> torch.Tensor:
    """Projected visual tokens (B, 288, C) of videos (B, F, 48, 48, 3); no gradient reaches the tower."""
    pixels = vlm_model.pixels(videos.reshape(-1, *videos.shape[2:]))
    with torch.no_grad():
        states = net.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    features = net.model.multi_modal_projector(states[-2][:, 1:])
    return features.reshape(len(videos), video_vlm_model.VISUAL, -1)


def read(
    net: Any, features: torch.Tensor, packed: Packed, keep: torch.Tensor | None, *, layer: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of packed questions behind a clip, and the kept visual tokens (B, K, C) behind language layer `layer`.

    Args:
        features: projected visual tokens (B, 288, C).
        keep: original indices (B, K) of the visual tokens that the language model sees, sorted; None keeps all. Kept tokens
            keep their positions, and the frames' words always stay.
    """
    batch = len(packed.ids)
    keep = torch.arange(video_vlm_model.VISUAL).expand(batch, -1) if keep is None else keep
    kept = features.gather(1, keep[..., None].expand(-1, -1, features.shape[-1]))
    vocabulary = {word: i for i, word in enumerate([*vlm_model.SPECIAL, *motions.words()])}
    fixed = torch.tensor([vlm_model.SPECIAL.index("<s>"), *(vocabulary[w] for w in motions.frame_words())])
    embed = net.model.language_model.embed_tokens(fixed).expand(batch, -1, -1)
    places = torch.cat(
        [torch.cat([torch.zeros(1, dtype=torch.long), video_vlm_model.WORD_PLACES]).expand(batch, -1),
         video_vlm_model.VISUAL_PLACES[keep]], dim=1
    )  # fmt: skip
    order = places.argsort(dim=1)
    prefix = torch.cat([embed, kept], dim=1).gather(1, order[..., None].expand(-1, -1, kept.shape[-1]))
    logits, states = read_behind(net, prefix, places.gather(1, order), packed, first=video_vlm_model.FIRST)
    back = order.argsort(dim=1)[:, len(fixed) :, None].expand(-1, -1, kept.shape[-1])
    return logits, states[layer].gather(1, back)


def _optimizer(net: Any, eye: Eye, motion: Motion, stage: str) -> training.MuonWithAdamW:
    """Fresh optimisers for a stage, over what the stage trains."""
    tower = list(net.model.vision_tower.named_parameters(prefix="model.vision_tower"))
    tower += list(eye.named_parameters(prefix="eye"))
    rest = [(n, p) for n, p in net.named_parameters() if not n.startswith("model.vision_tower")]
    rest += list(motion.named_parameters(prefix="motion"))
    matrices, others = training.split_matrices(
        tower if stage == "see" else rest, lambda n: ".layers." in n or "projector" in n
    )
    return training.MuonWithAdamW(matrices, others)


def _stage(recipe: VideoVlmRecipe, step: int) -> tuple[str, int, int]:
    """The stage of a step, the step inside it, and its length."""
    for name, length in recipe.steps().items():
        if step < length:
            return name, step, length
        step -= length
    raise IndexError(step)


def train(
    recipe: VideoVlmRecipe,
    folder: str | Path,
    *,
    start: str | Path | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> Any:
    """Run or resume a training in `folder`; returns the trained LLaVA model.

    Args:
        start: folder of the image VLM to start from; the embedded one by default.
    Raises:
        ValueError: the folder holds a run of another recipe, or one that started from other weights.
    """
    start = Path(start or data_folder() / "tiny-vlm")
    run = training.Run(
        folder, {"kind": "tiny-video-vlm", "start": digest(start / "model.safetensors"), **asdict(recipe)}
    )
    torch.manual_seed(recipe.seed)
    net, eye, motion = video_vlm_model.model(start).train(), Eye(), Motion()
    words, parts = video_vlm_model.tokenizer(), {"net": net, "eye": eye, "motion": motion}
    begun, steps = 0, sum(recipe.steps().values())
    optimizer, stage_now = None, None
    if (stored := run.load()) is not None:
        tensors, state = stored
        for name, part in parts.items():
            part.load_state_dict(training.without_prefix(name, tensors))
        begun, stage_now = state["step"], state["stage"]
        optimizer = _optimizer(net, eye, motion, stage_now)
        optimizer.load_tensors(tensors)
    window: list[dict[str, float]] = []
    for step in range(begun, steps):
        stage, inner, length = _stage(recipe, step)
        if stage != stage_now or optimizer is None:
            optimizer, stage_now = _optimizer(net, eye, motion, stage), stage
        draw = training.rng(recipe.seed, step)
        most = 1 if stage == "follow" else motions.OBJECTS
        some = stage != "join" or inner % 2 == 1
        size = recipe.batch if some else recipe.whole_batch
        batch = motions.sample(motions.TRAIN_SEED + recipe.seed, step, size, most=most)
        if stage == "see":
            frames = batch.frames(draw.choice(motions.FRAMES, size=recipe.see_frames, replace=False))
            states = net.model.vision_tower(vlm_model.pixels(frames.images), output_hidden_states=True).hidden_states
            loss, row = eye(states, patch_truth(frames))
        else:
            packed = pack(batch, draw, recipe.questions, words, ask=motions.ask)
            count = int(draw.choice(recipe.join_tokens)) if stage == "join" else recipe.read_tokens
            loss, row = _step(recipe, net, motion, batch, packed, draw, count if some else None)
        loss.backward()
        lr = training.warmup_constant_linear(
            inner, steps=length, lr=recipe.join_lr if stage == "join" else recipe.lr, warmup=recipe.warmup,
            constant=recipe.constant,
        )  # fmt: skip
        optimizer.step(lr)
        window.append({"loss": loss.item(), **row})
        done = step + 1
        if done % LOG_EVERY == 0 or inner + 1 == length:
            kinds = dict.fromkeys(k for w in window for k in w)
            mean = {k: float(np.mean([w[k] for w in window if k in w])) for k in kinds}
            window.clear()
            run.log(step=done, stage=stage, lr=lr, **mean)
            if progress:
                progress(done, steps, mean)
        if done % CHECKPOINT_EVERY == 0 or done == steps:
            tensors = {k: v for n, p in parts.items() for k, v in training.with_prefix(n, p.state_dict()).items()}
            run.save(tensors | optimizer.tensors(), step=done, stage=stage)
        if stage != "see" and (done % EVALUATE_EVERY == 0 or done == steps):
            score = evaluate(net, seed=motions.GATE_SEED, count=512)
            run.log(step=done, quick=score)
            if progress:
                progress(done, steps, score)
            net.train()
    return net.eval()


def _step(
    recipe: VideoVlmRecipe, net: Any, motion: Motion, batch: motions.Motions, packed: Packed, draw: np.random.Generator,
    count: int | None,
) -> tuple[torch.Tensor, dict[str, float]]:  # fmt: skip
    """Loss and figures of one step on questions; the language model sees `count` visual tokens, None for all."""
    truth = motion_truth(batch, patch_truth(batch.frames()))
    features, keep = look(net, batch.videos), None
    if count is not None:
        keep = some_tokens(truth["object"], count, draw, bias=1.0)
        truth = {
            k: v.gather(1, keep if v.ndim == 2 else keep[..., None].expand(-1, -1, v.shape[-1]))
            for k, v in truth.items()
        }
    logits, hidden = read(net, features, packed, keep, layer=recipe.motion_layer)
    loss, right = answer_loss(logits, packed)
    follows, known = motion(hidden, truth)
    row = {"exact": right.float().mean().item(), "known": known}
    asked = torch.tensor([[q.kind == "direction" for q in clip] for clip in packed.questions])
    if asked.any():
        row["direction"] = right[asked].float().mean().item()
    return loss + recipe.motion * follows, row


@torch.no_grad()
def evaluate(net: Any, *, seed: int, count: int, policy: Policy | None = None) -> dict[str, float]:
    """Exact match on at least `count` questions of a split (whole batches of 64), overall and per kind.

    Args:
        policy: maps (model, projected visual tokens (B, 288, C), generator) to the visual tokens (B, K) that stay.
    """
    net = net.eval()
    words = video_vlm_model.tokenizer()
    hits: dict[str, list[float]] = {kind: [] for kind in motions.KINDS}
    per_clip, size = 4, 16
    for index in range(-(-count // (per_clip * size))):
        batch = motions.sample(seed, index, size)
        draw = training.rng(seed, index)
        packed = pack(batch, draw, per_clip, words, ask=motions.ask)
        features = look(net, batch.videos)
        keep = policy(net, features, draw) if policy else None
        _, right = answer_loss(read(net, features, packed, keep)[0], packed)
        for row, answers in zip(right, packed.questions, strict=True):
            for hit, question in zip(row, answers, strict=True):
                hits[question.kind].append(float(hit))
    every = [h for values in hits.values() for h in values]
    return {
        "questions": len(every),
        "exact_match": float(np.mean(every)),
        **{k: float(np.mean(v)) for k, v in hits.items() if v},
    }


def random_tokens(count: int) -> Policy:
    """A policy for `evaluate`: `count` visual tokens, drawn evenly."""

    def draw(net: Any, features: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        return some_tokens(torch.zeros(features.shape[:2]), count, rng, bias=0.0)

    return draw
