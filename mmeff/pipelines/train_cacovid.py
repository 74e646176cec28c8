"""Train CaCoVID's policy on a frozen vision-language model: which video tokens do its right answers depend on?

For every question some masks are drawn from the policy, each keeping the same number of video tokens; the model answers
under each, and the policy is moved towards masks that did better than the others. Nothing of the model is changed.

    recipe = CaCoVIDRecipe.small(questions=500)
    done = train_cacovid(model, questions, recipe, "runs/train-cacovid", out="runs/policy")
    mmeff.accelerate(model, "cacovid", policy="runs/policy", keep=0.25)

The paper lets the model generate an answer per mask and marks it. Here the reward is read from one forward pass over all
masks at once, with the gold answer given: its log-likelihood ("likelihood"), or whether every token of it was the most
likely one ("exact", which is what greedy decoding would have answered). Masks keep equally many tokens, so they make a batch.

Differs from the published code besides: the policy is trained in float32, and token counts per frame are at least one.

Reading order: `CaCoVIDRecipe`, `learn` (one question), `train_cacovid` (the run); questions and the frozen model are in
`train_cacovid_prompts`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmeff import training
from mmeff.handle import describe_model, model_note
from mmeff.pipelines.train_cacovid_prompts import (
    Prompt,
    VideoQuestion,
    VideoQuestions,
    frame_indices,
    language_model,
    masked_likelihood,
    read_prompt,
)
from mmeff.pipelines.train_cacovid_results import TrainedPolicy, check_out, write_result
from mmeff.pruning import _cacovid_training as rl
from mmeff.pruning._cacovid_policy import Policy
from mmeff.pruning.cacovid import CaCoVID, choose, spread

LOG_EVERY = 10  # questions
Progress = Callable[[int, int, dict[str, float]], None]
Judge = Callable[
    [Tensor], tuple[Tensor, Tensor]
]  # masks (M, F, P) to rewards (M,), and how right they are in [0, 1] (M,)


@dataclass(frozen=True, kw_only=True)
class CaCoVIDRecipe:
    """Everything that decides the policy, besides the model and the questions. Defaults are the published ones.

    Raises: ValueError for a value out of range.
    """

    reward: Literal["likelihood", "exact"] = "likelihood"
    questions: int = 10_000  # steps; each makes `updates` updates
    updates: int = 5  # per question; each draws new masks, and learns from all of the question's
    token_masks: int = 23  # per update
    frame_masks: int = 8
    alpha: float = 0.02  # fraction of the video tokens that a mask keeps, at a question's first update
    alpha_floor: float = 0.01  # after easy rounds
    alpha_cap: float = 0.12  # after hard ones
    frames_kept: float = 0.125  # fraction of the frames that a frame mask keeps tokens of
    clip_low: float = 0.2  # of the ratio, PPO
    clip_high: float = 0.28
    kl: float = 0.0  # weight of the divergence from a policy that knows nothing
    lr: float = 1e-6  # of the heads; cosine
    layer_lr: float = 0.1  # of the layer, as a fraction of lr
    warmup: int = 0  # updates
    weight_decay: float = 0.01
    clip: float = 5.0  # norm of the gradient
    seed: int = 42
    masks_at_once: int = 0  # masks of a forward of the model; 0 is all
    held_out_keep: float = 0.25  # setting of CaCoVID that held-out questions are answered under
    held_out_every: int = 500  # questions
    checkpoint_every: int = 100

    @classmethod
    def small(cls, **fields: Any) -> CaCoVIDRecipe:
        """For a model of at most half a billion parameters, whose frames have few tokens; some fields changed.

        Larger steps, because a few hundred questions must do, and more tokens per mask.
        """
        return cls(**{"questions": 400, "alpha": 0.1, "alpha_floor": 0.05, "alpha_cap": 0.25, "frames_kept": 0.375,
                      "lr": 3e-4, "warmup": 20, "held_out_every": 100, **fields})  # fmt: skip

    def __post_init__(self) -> None:
        if self.reward not in ("likelihood", "exact"):
            raise ValueError(f"CaCoVIDRecipe.reward must be 'likelihood' or 'exact', got {self.reward!r}")
        at_least = {
            "questions": 1, "updates": 1, "token_masks": 2, "frame_masks": 2, "warmup": 0, "seed": 0, "masks_at_once": 0,
            "held_out_every": 1, "checkpoint_every": 1,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"CaCoVIDRecipe.{name} must be an int >= {least}, got {value!r}")
        for name in ("alpha", "alpha_floor", "alpha_cap", "frames_kept", "held_out_keep"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"CaCoVIDRecipe.{name} must be in (0, 1], got {getattr(self, name)!r}")
        if not 0 < self.clip_low < 1:
            raise ValueError(f"CaCoVIDRecipe.clip_low must be in (0, 1), got {self.clip_low!r}")
        positive_or_zero = {
            "lr": True,
            "clip": True,
            "clip_high": True,
            "layer_lr": False,
            "kl": False,
            "weight_decay": False,
        }
        for name, positive in positive_or_zero.items():
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                raise ValueError(
                    f"CaCoVIDRecipe.{name} must be finite and {'> 0' if positive else '>= 0'}, got {value!r}"
                )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)


# -------------------------------------------------------------------- learning from one question


class TwoRates(training.Optimizer):
    """AdamW: the heads and the norm at the full rate, the layer at a fraction; biases and norms do not decay."""

    def __init__(self, policy: Policy, recipe: CaCoVIDRecipe) -> None:
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, p in policy.named_parameters():
            groups.setdefault((name.startswith("layer."), p.ndim > 1), []).append(p)
        super().__init__([
            torch.optim.AdamW(
                [
                    {"params": ps, "rate": recipe.layer_lr if shared else 1.0, "weight_decay": recipe.weight_decay * matrix}
                    for (shared, matrix), ps in groups.items()
                ],
                lr=recipe.lr,
            )
        ])  # fmt: skip

    def step(self, lr: float, *, clip: float = 1.0) -> float:
        """As the base; every group at its fraction of `lr`."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        for group in self.optimizers[0].param_groups:
            group["lr"] = lr * group["rate"]
        self.optimizers[0].step()
        self.optimizers[0].zero_grad(set_to_none=True)
        return float(norm)


def cosine(step: int, *, steps: int, lr: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def learn(
    policy: Policy, optimizer: TwoRates, prompt: Prompt, judge: Judge, recipe: CaCoVIDRecipe, step: int
) -> dict[str, float]:
    """All updates of one question. Returns figures of the first round of masks, and of the last update.

    Args: judge: gives masks their rewards. step: of the run; it decides learning rates and random draws.
    Raises: ValueError where a reward or the loss is not finite.
    """
    draw = training.torch_rng(recipe.seed, step)
    video = prompt.embeds[prompt.slots]
    size, alpha = prompt.slots.shape[1], recipe.alpha
    seen_tokens, seen_frames, token_rewards, frame_rewards = [], [], [], []
    figures: dict[str, float] = {}
    for update in range(recipe.updates):
        tokens, frames = prompt.logits(policy)
        if update == 0:
            old_tokens, old_frames = tokens.detach(), frames.detach()
        k = rl.kept_per_frame(alpha, size)
        content = rl.content_mask(video, k)[None]
        by_token = rl.token_masks(old_tokens, alpha, recipe.token_masks, draw)
        by_frame, chosen = rl.frame_masks(old_frames, video, k, recipe.frame_masks, recipe.frames_kept, draw)
        rewards, right = judge(torch.cat([content, by_token, by_frame]))
        if not bool(rewards.isfinite().all()):
            raise ValueError(
                f"rewards must be finite, got {rewards.tolist()} in question {step + 1}; load the model in a wider dtype"
            )
        parts = right.float().split([1, len(by_token), len(by_frame)])
        if update == 0:
            names = ("content", "token", "frame")
            figures = {f"{n}_reward": float(p.mean()) for n, p in zip(names, parts, strict=True)}
            figures |= {"best_token_reward": float(parts[1][0]), "best_frame_reward": float(parts[2][0])}
        seen_tokens.append(by_token.flatten(1))
        seen_frames.append(chosen)
        token_rewards.append(rewards[1 : 1 + len(by_token)].float())
        frame_rewards.append(rewards[1 + len(by_token) :].float())
        limits = {"low": recipe.clip_low, "high": recipe.clip_high}
        loss = rl.token_loss(
            tokens.flatten(), old_tokens.flatten(), torch.cat(seen_tokens), torch.cat(token_rewards), **limits
        ) + rl.frame_loss(frames, old_frames, torch.cat(seen_frames), torch.cat(frame_rewards), **limits)
        if recipe.kl:
            loss = loss + recipe.kl * (rl.divergence_from_even(tokens) + rl.divergence_from_even(frames))
        if not math.isfinite(loss.item()):
            raise ValueError(
                f"the loss must stay finite, got {loss.item()} in question {step + 1}; lower lr={recipe.lr}"
            )
        loss.backward()
        done = step * recipe.updates + update
        lr = cosine(done, steps=recipe.questions * recipe.updates, lr=recipe.lr, warmup=recipe.warmup)
        figures |= {"loss": loss.item(), "norm": optimizer.step(lr, clip=recipe.clip), "lr": lr, "alpha": alpha}
        alpha = rl.next_alpha(
            alpha, float(right.float().mean()), start=recipe.alpha, floor=recipe.alpha_floor, cap=recipe.alpha_cap
        )
    return figures


# -------------------------------------------------------------------- the run


def train_cacovid(
    model: Any, questions: VideoQuestions, recipe: CaCoVIDRecipe, folder: str | Path, *, out: str | Path | None = None,
    progress: Progress | None = None,
) -> TrainedPolicy:  # fmt: skip
    """Run or resume a training, and write the policy with its curve and card.

    Args:
        model: a transformers vision-language model with one position per token and a Llama-like language model.
        questions: a `QuestionList`, or anything that answers as `VideoQuestions` says.
        folder: of the run: config, log, checkpoint. A run there is resumed.
        out: where the policy goes, for `CaCoVID(policy=out)`; `folder/result` unless given.
        progress: called with (questions done, questions, figures).
    Returns: a `TrainedPolicy`. The model is left as it was.
    Raises: UnsupportedModel, ValueError: as `read_prompt` and `Policy.from_layer`, and for folders that do not fit.
    """
    folder, out = Path(folder), Path(folder) / "result" if out is None else Path(out)
    check_out(out)
    language = language_model(model)
    name = describe_model(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        policy = Policy.from_layer(language.layers[0], language.config, trained_on=name).to(model.device)
    held_out = questions.held_out()
    if not held_out:
        raise ValueError("a policy is judged on held-out questions, got none; hold out at least one")
    read_prompt(model, questions.training(recipe.seed, 0))  # refuse what cannot be trained on before files are touched
    config = {"kind": "cacovid", "model": name, "data": questions.describe(), **recipe.to_dict()}
    run = training.Run(folder, config)
    optimizer = TwoRates(policy, recipe)
    start = 0
    if (stored := run.load()) is not None:
        tensors, state = stored
        policy.load_state_dict(training.without_prefix("policy", tensors))
        optimizer.load_tensors(tensors)
        start = state["step"]

    def note(step: int, row: dict[str, float]) -> None:
        run.log(step=step, **row)
        if progress:
            progress(step, recipe.questions, row)

    with _evaluating(model):
        if start == 0:
            note(0, {**baselines(model, held_out, recipe), **held_out_figures(model, policy, held_out, recipe)})
        rows: list[dict[str, float]] = []
        for step in range(start, recipe.questions):
            question = questions.training(recipe.seed, step)
            prompt = read_prompt(model, question)
            rows.append(learn(policy, optimizer, prompt, _judge(model, prompt, question, recipe), recipe, step))
            last = step + 1 == recipe.questions
            if (step + 1) % LOG_EVERY == 0 or last:
                note(step + 1, {k: math.fsum(r[k] for r in rows) / len(rows) for k in rows[0]})
                rows = []
            if (step + 1) % recipe.held_out_every == 0 or last:
                note(step + 1, held_out_figures(model, policy, held_out, recipe))
            if (step + 1) % recipe.checkpoint_every == 0 or last:
                run.save(training.with_prefix("policy", policy.state_dict()) | optimizer.tensors(), step=step + 1)
    done = TrainedPolicy(
        folder=out,
        rows=training.logged(folder),
        model=name,
        note=model_note(model),
        data=config["data"],
        recipe=recipe.to_dict(),
    )
    write_result(done, policy)
    return done


def _judge(model: Any, prompt: Prompt, question: VideoQuestion, recipe: CaCoVIDRecipe) -> Judge:
    """Rewards by the frozen model; how right a mask is, is the answer's probability per token, or whether it was exact."""

    def judge(masks: Tensor) -> tuple[Tensor, Tensor]:
        likelihood, exact = masked_likelihood(
            model, prompt.embeds, prompt.positions, prompt.columns(masks), question.answer, at_once=recipe.masks_at_once
        )
        return (likelihood, likelihood.exp()) if recipe.reward == "likelihood" else (exact.float(), exact.float())

    return judge


@torch.no_grad()
def held_out_figures(
    model: Any, policy: Policy, questions: Sequence[VideoQuestion], recipe: CaCoVIDRecipe
) -> dict[str, float]:
    """Mean probability per token of held-out answers, and share of exact ones, under `CaCoVID(keep=held_out_keep)`."""

    method = CaCoVID(keep=recipe.held_out_keep)

    def pick(prompt: Prompt, count: Tensor) -> Tensor:
        tokens, frames = prompt.logits(policy)
        present = torch.ones(1, prompt.slots.numel(), dtype=torch.bool, device=prompt.slots.device)
        return choose(
            tokens.view(1, -1), frames[None], frame_indices(prompt.slots), present, count,
            importance=method.importance, cap=method.cap,
        )  # fmt: skip

    return _answered(model, questions, recipe, "held_out", pick)


@torch.no_grad()
def baselines(model: Any, questions: Sequence[VideoQuestion], recipe: CaCoVIDRecipe) -> dict[str, float]:
    """The same figures with as many tokens spread evenly ("even"), and with all of them ("all")."""

    def even(prompt: Prompt, count: Tensor) -> Tensor:
        return spread(torch.ones(1, prompt.slots.numel(), dtype=torch.bool, device=count.device), count)

    def everything(prompt: Prompt, count: Tensor) -> Tensor:
        return torch.ones(1, prompt.slots.numel(), dtype=torch.bool, device=count.device)

    return {
        **_answered(model, questions, recipe, "even", even),
        **_answered(model, questions, recipe, "all", everything),
    }


def _answered(
    model: Any,
    questions: Sequence[VideoQuestion],
    recipe: CaCoVIDRecipe,
    name: str,
    pick: Callable[[Prompt, Tensor], Tensor],
) -> dict[str, float]:
    probability = exact = 0.0
    for question in questions:
        prompt = read_prompt(model, question)
        count = torch.tensor([max(1, round(recipe.held_out_keep * prompt.slots.numel()))], device=prompt.slots.device)
        masks = pick(prompt, count).view(1, *prompt.slots.shape)
        likelihood, right = masked_likelihood(
            model, prompt.embeds, prompt.positions, prompt.columns(masks), question.answer
        )
        probability += float(likelihood.exp())
        exact += float(right)
    return {name: probability / len(questions), f"{name}_exact": exact / len(questions)}


@contextmanager
def _evaluating(model: Any) -> Any:
    """The model without dropout, and as it was afterwards."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
