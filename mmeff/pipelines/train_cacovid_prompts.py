"""What CaCoVID is trained on: questions about videos, their prompts, and how a frozen model answers with some tokens missing.

Reading order: `VideoQuestion` and where questions come from, `read_prompt`, `masked_likelihood`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmeff import training
from mmeff.errors import UnsupportedModel
from mmeff.pruning._cacovid_policy import Policy


class VideoQuestion(NamedTuple):
    """A question about a video, and its answer.

    inputs: what the model's processor makes of one prompt (batch of 1, no padding), up to where the answer begins.
    answer: (A,) token ids of the gold answer, with its end mark. frames: of the video; all have equally many tokens.
    """

    inputs: Mapping[str, Any]
    answer: Tensor
    frames: int


class VideoQuestions(Protocol):
    """Where questions come from. Which one a step sees is a function of seed and step, so that runs can be resumed."""

    def describe(self) -> dict[str, Any]:
        """What the questions are, in plain values: it goes into the run's config and the policy's card."""

    def training(self, seed: int, step: int) -> VideoQuestion:
        """The question of one step."""

    def held_out(self) -> Sequence[VideoQuestion]:
        """Questions that are never trained on, always the same."""


class QuestionList:
    """Questions that are all there: every epoch in another order, the last `held_out` of them never trained on.

    Raises: ValueError unless some are left to train on.
    """

    def __init__(self, questions: Iterable[VideoQuestion], *, held_out: int, name: str = "questions") -> None:
        everything = list(questions)
        if not 0 < held_out < len(everything):
            raise ValueError(
                f"held_out must be in [1, {len(everything) - 1}] for {len(everything)} questions, got {held_out}"
            )
        self._train, self._held_out, self._name = everything[:-held_out], everything[-held_out:], name

    def describe(self) -> dict[str, Any]:
        return {"name": self._name, "questions": len(self._train), "held out": len(self._held_out)}

    def training(self, seed: int, step: int) -> VideoQuestion:
        epoch, place = divmod(step, len(self._train))
        return self._train[training.rng(seed, epoch, stream=7).permutation(len(self._train))[place]]

    def held_out(self) -> Sequence[VideoQuestion]:
        return self._held_out


# -------------------------------------------------------------------- the frozen model


class Prompt(NamedTuple):
    """What enters the first decoder layer: embeds (S, D), positions (S,), rotary cos and sin (1, S, head dim), and
    where the video tokens lie, slots (F, P)."""

    embeds: Tensor
    positions: Tensor
    rotary: tuple[Tensor, Tensor]
    slots: Tensor

    def columns(self, masks: Tensor) -> Tensor:
        """(M, S) bool: which tokens of the prompt stay under masks (M, F, P) of video tokens."""
        kept = torch.ones(len(masks), len(self.embeds), dtype=torch.bool, device=masks.device)
        kept[:, self.slots.flatten()] = masks.flatten(1)
        return kept

    def logits(self, policy: Policy) -> tuple[Tensor, Tensor]:
        """The policy's opinion: of tokens (F, P) and of frames (F,)."""
        frames, size = self.slots.shape
        slots = self.slots.view(1, -1)
        hidden = self.embeds[None].float()
        tokens, whole = policy(
            hidden, torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device), self.rotary, slots,
            torch.ones_like(slots, dtype=torch.bool), frame_indices(self.slots), frames,
        )  # fmt: skip
        return tokens.view(frames, size), whole[0]


def frame_indices(slots: Tensor) -> Tensor:
    """(1, F * P): the frame of each video token."""
    frames, size = slots.shape
    return torch.arange(frames, device=slots.device).repeat_interleave(size)[None]


class _Reached(Exception):
    """Ends a forward pass where the language model would begin."""


@torch.no_grad()
def read_prompt(model: Any, question: VideoQuestion) -> Prompt:
    """Embed a question's prompt: everything of the model that runs before its first decoder layer.

    Raises:
        UnsupportedModel: positions of more than one dimension, or visual features that enter later layers too.
        ValueError: a batch, padding, an empty answer, or video tokens that cannot be divided among the frames.
    """
    language = language_model(model)
    inputs = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in question.inputs.items()}
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if ids.shape[0] != 1 or (mask is not None and not bool(mask.all())):
        raise ValueError(
            f"a question is one prompt without padding, got input_ids {tuple(ids.shape)}; pass them one by one"
        )
    if question.answer.ndim != 1 or not question.answer.numel():
        raise ValueError(f"an answer is token ids (A,), at least one, got a tensor {tuple(question.answer.shape)}")
    caught: dict[str, Any] = {}

    def stop(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        caught.update(kwargs)
        raise _Reached

    hook = language.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**inputs)
    except _Reached:
        pass
    finally:
        hook.remove()
    embeds, positions = caught["inputs_embeds"], caught.get("position_ids")
    if positions is None:
        positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
    if positions.ndim != 2 or caught.get("deepstack_visual_embeds") is not None:
        raise UnsupportedModel(
            f"CaCoVID is trained on models with one position per token and no visual features in later layers, which "
            f"{type(model).__name__} is not; use a LLaVA or LLaVA-OneVision"
        )
    return Prompt(
        embeds[0], positions[0], language.rotary_emb(embeds, positions), _video_slots(model, ids[0], question.frames)
    )


def _video_slots(model: Any, ids: Tensor, frames: int) -> Tensor:
    config = model.config
    marks = [
        v for v in (getattr(config, "image_token_id", None), getattr(config, "video_token_id", None)) if v is not None
    ]
    found = torch.isin(ids, torch.tensor(marks, device=ids.device)).nonzero()[:, 0]
    if config.model_type == "llava_onevision" and len(found) % frames == 1:
        found = found[:-1]  # the newline embedding behind a video, which always stays
    if frames < 1 or not len(found) or len(found) % frames:
        raise ValueError(
            f"the video tokens of a prompt must divide into its frames, got {len(found)} tokens and {frames} frames; pass the "
            "number of frames that the processor really took"
        )
    return found.view(frames, -1)


def language_model(model: Any) -> Any:
    language = getattr(getattr(model, "model", None), "language_model", None)
    if language is None or not hasattr(language, "rotary_emb") or not hasattr(language, "layers"):
        raise UnsupportedModel(
            f"CaCoVID is trained on a transformers vision-language model with model.language_model, got {type(model).__name__}"
        )
    return language


@torch.no_grad()
def masked_likelihood(
    model: Any, embeds: Tensor, positions: Tensor, keep_masks: Tensor, answer_ids: Tensor, *, at_once: int = 0
) -> tuple[Tensor, Tensor]:
    """How likely an answer is when the language model sees only some tokens of the prompt, at their original positions.

    Args:
        embeds: (S, D) and positions: (S,) of the prompt. keep_masks: (M, S) bool, each with the same number of True.
        answer_ids: (A,). at_once: masks of one forward; 0 is all.
    Returns: (M,) float32 mean log-probability of the answer's tokens, and (M,) bool whether each of them was the most
        likely one, so that greedy decoding gives the answer.
    Raises: ValueError for masks that keep different numbers of tokens.
    """
    counts = keep_masks.sum(1)
    if int(counts.min()) != int(counts.max()):
        raise ValueError(
            f"masks must keep equally many tokens, got between {int(counts.min())} and {int(counts.max())}"
        )
    answer = answer_ids.to(embeds.device)
    given = model.get_input_embeddings()(answer[:-1]).to(embeds.dtype)
    behind = positions.max() + 1 + torch.arange(len(given), device=positions.device)
    kept = keep_masks.nonzero()[:, 1].view(len(keep_masks), -1)
    likelihoods, exact = [], []
    for at in kept.split(at_once or len(kept)):
        x = torch.cat([embeds[at], given.expand(len(at), -1, -1)], dim=1)
        places = torch.cat([positions[at], behind.expand(len(at), -1)], dim=1)
        hidden = language_model(model)(
            inputs_embeds=x,
            position_ids=places,
            # without a mask transformers takes gaps between positions for borders of packed sequences
            attention_mask=torch.ones_like(places),
            use_cache=False,
        ).last_hidden_state
        logits = model.get_output_embeddings()(hidden[:, -len(answer) :]).float()
        likelihoods.append(logits.log_softmax(-1)[:, torch.arange(len(answer), device=answer.device), answer].mean(1))
        exact.append((logits.argmax(-1) == answer).all(1))
    return torch.cat(likelihoods), torch.cat(exact)
