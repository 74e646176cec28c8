"""Train the tiny VLA by behaviour cloning: a stock LLaVA whose answer is three action words.

It starts from the weights of the tiny VLM, whose words it keeps. The whole recipe is `VlaRecipe`; budgets are steps.

    see    the vision tower alone, with auxiliary heads over its patches, meets rings and the gripper
    read   the language model on frozen features, with the tokens of items and few others
    join   everything
    drop   as `join`, but in half of the batches background tokens are dropped; the tower does not learn from those

Every picture comes from an episode in which a scripted expert acts while some of its actions are replaced by random ones, so
that the policy learns to recover (DART). Behind each picture stand several instructions, each with what the expert would do
about it; each sees the picture and itself alone (`train_vlm` does the same with questions). Auxiliary heads tell the language
model where the named things are; all heads are dropped afterwards. With `aggregate_every` the policy itself acts from time
to time, and the expert labels what it ran into (DAgger).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmeff import tiny, training
from mmeff.tiny import manipulation, scenes, vla_model, vlm_model
from mmeff.tiny.train_vlm import some_tokens

SAID = 8  # words of an instruction
SEGMENT = SAID + 4  # with three action words and the end mark
WHAT, WHERE = 3, SAID - 1  # the words that complete the names of the object and of the ring
KINDS = len(scenes.SHAPES) + 4  # shapes, ring, open gripper, closed gripper, table
PLACED, AIMED = 4, 5  # layers of the language model after which places and the way to go are read
STAGES = ("see", "read", "join", "drop")
CHECKPOINT_EVERY = 100
EVALUATE_EVERY = 500


@dataclass(frozen=True, kw_only=True)
class VlaRecipe:
    """Everything that decides the weights."""

    seed: int = 1
    see_steps: int = 200
    read_steps: int = 600
    join_steps: int = 350
    drop_steps: int = 350
    batch: int = 16
    lr: float = 2e-3
    join_lr: float = 1.2e-3
    warmup: int = 40
    constant: float = 0.5  # fraction before linear decay of `see`, and of `join` and `drop` together; `read` has none
    noise: float = 0.2  # share of the expert's actions that a random one replaces
    read_tokens: int = 56  # visual tokens in `read`, those on items first
    drop_tokens: tuple[int, ...] = (18, 36, 72)
    eye: float = 0.2  # weight of the tower's auxiliary losses after `see`
    aim: float = 1.0  # weight of the language model's
    aggregate_every: int = 200  # steps of `join` and `drop` between two rounds of the policy's own episodes; 0 for none
    aggregate_episodes: int = 32

    def steps(self) -> int:
        """Steps of all stages."""
        return sum(getattr(self, f"{stage}_steps") for stage in STAGES)


class Heads(nn.Module):
    """Auxiliary heads: over patches of the vision tower, and over words of the language model."""

    def __init__(self) -> None:
        super().__init__()
        dim = vlm_model.DIM
        self.colour = nn.Linear(dim, len(scenes.COLOURS) + 1)
        self.kind = nn.Linear(dim, KINDS)
        self.mask = nn.Linear(dim, vlm_model.PATCH**2)
        self.centre = nn.Linear(dim, 2)
        self.what, self.where, self.gripper, self.way = (nn.Linear(dim, 2) for _ in range(4))

    def see(self, patches: torch.Tensor, truth: dict[str, torch.Tensor]) -> torch.Tensor:
        """The loss over patches (B, V, C): what owns each of them, which of its pixels, and where the owner's centre is."""
        loss = F.cross_entropy(self.colour(patches).flatten(0, 1), truth["colour"].flatten())
        loss = loss + F.cross_entropy(self.kind(patches).flatten(0, 1), truth["kind"].flatten())
        loss = loss + F.binary_cross_entropy_with_logits(self.mask(patches), truth["mask"])
        owned = truth["owned"]
        return loss + 4 * F.smooth_l1_loss(self.centre(patches)[owned], truth["centre"][owned], beta=0.05)

    def aim(self, states: tuple[torch.Tensor, ...], asked: Asked) -> torch.Tensor:
        """The loss over words, from hidden states (B, Q * SEGMENT, C) of every layer."""
        what = states[PLACED].unflatten(1, (-1, SEGMENT))[:, :, WHAT]
        where = states[PLACED].unflatten(1, (-1, SEGMENT))[:, :, WHERE]
        way = states[AIMED].unflatten(1, (-1, SEGMENT))[:, :, WHERE]
        pairs = (
            (self.what(what), asked.what), (self.where(where), asked.where),
            (self.gripper(where), asked.gripper), (self.way(way), asked.way),
        )  # fmt: skip
        return torch.stack([F.smooth_l1_loss(found, true, beta=0.05) for found, true in pairs]).sum()


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Instructions with the expert's actions as tokens, ids (B, Q, SEGMENT), and places (B, Q, 2) in [-1, 1]: of the object,
    the ring and the gripper, and the way from the gripper to where it should go."""

    ids: torch.Tensor
    what: torch.Tensor
    where: torch.Tensor
    gripper: torch.Tensor
    way: torch.Tensor


def ask(tables: manipulation.Tables, state: manipulation.State) -> Asked:
    """Four instructions per table: its own, its object with the other ring, and both other objects."""
    ids = {w: i for i, w in enumerate([*vlm_model.SPECIAL, *vla_model.vocabulary()])}
    other = 2 * manipulation.OBJECTS + 1 - tables.place  # rings are items 3 and 4
    picks = [
        tables.pick,
        tables.pick,
        (tables.pick + 1) % manipulation.OBJECTS,
        (tables.pick + 2) % manipulation.OBJECTS,
    ]
    places = [tables.place, other, tables.place, other]
    rows = np.arange(len(tables))
    columns: dict[str, list[Any]] = {f.name: [] for f in fields(Asked)}
    for pick, place in zip(picks, places, strict=True):
        said = []
        for b, action in enumerate(manipulation.expert(state, pick, place)):
            names = manipulation.X_WORDS[action[0]], manipulation.Y_WORDS[action[1]], manipulation.GRIPS[action[2]]
            words = [*tables.instruction(b, int(pick[b]), int(place[b])).split(), *names, "</s>"]
            said.append([ids[w] for w in words])
        what, where = state.centre[rows, pick], state.centre[rows, place]
        goal = np.where((state.held == pick)[:, None], where, what)
        columns["ids"].append(torch.tensor(said))
        for name, place_of in (("what", what), ("where", where), ("gripper", state.gripper)):
            columns[name].append(_unit(place_of))
        columns["way"].append(torch.from_numpy((goal - state.gripper) * (2 / scenes.SIZE)).float())
    return Asked(**{name: torch.stack(parts, dim=1) for name, parts in columns.items()})


def _unit(centre: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(centre * (2 / scenes.SIZE) - 1).float()


def patch_truth(tables: manipulation.Tables, state: manipulation.State, owner: np.ndarray) -> dict[str, torch.Tensor]:
    """Targets of the patch heads; `first` ranks tokens for dropping: the gripper's 2, those of other items 1, table 0."""
    b, side, p = len(tables), vlm_model.SIDE, vlm_model.PATCH
    cells = torch.from_numpy(owner).reshape(b, side, p, side, p).transpose(2, 3).reshape(b, side * side, p * p)
    share = torch.stack([(cells == o).float().mean(-1) for o in range(manipulation.ITEMS + 1)], dim=-1)
    most, which = share.max(dim=-1)
    owned = most > 0.1
    none = len(scenes.COLOURS)
    colours = np.concatenate([tables.colour, np.full((b, 1), none)], axis=1)
    kinds = np.concatenate([tables.shape, len(scenes.SHAPES) + 1 + state.closed[:, None].astype(np.int64)], axis=1)
    centres = _unit(np.concatenate([state.centre, state.gripper[:, None]], axis=1))
    return {
        "colour": torch.where(owned, torch.from_numpy(colours).gather(1, which), none),
        "kind": torch.where(owned, torch.from_numpy(kinds).gather(1, which), KINDS - 1),
        "mask": (cells >= 0).float(),
        "centre": centres.gather(1, which[..., None].expand(-1, -1, 2)),
        "owned": owned,
        "first": owned.float() + (share[..., manipulation.GRIPPER] > 0.1).float(),
    }


def read(
    net: Any, features: torch.Tensor, ids: torch.Tensor, keep: torch.Tensor | None
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Logits (B, Q, SEGMENT, vocabulary) behind each packed token, and their hidden states of all layers.

    Args:
        features: projected visual tokens (B, V, C). ids: (B, Q, SEGMENT).
        keep: original indices (B, K) of the visual tokens that the language model sees, at their own positions; None for all.
    """
    batch, count, _ = ids.shape
    places = torch.arange(vlm_model.VISUAL).expand(batch, -1) if keep is None else keep
    if keep is not None:
        features = features.gather(1, keep[..., None].expand(-1, -1, features.shape[-1]))
    embed = net.model.language_model.embed_tokens
    first = embed(torch.full((batch, 1), vlm_model.SPECIAL.index("<s>")))
    prefix = 1 + places.shape[1]
    row = torch.arange(prefix + count * SEGMENT)
    segment = torch.where(row < prefix, -1, (row - prefix) // SEGMENT)
    visible = (row[:, None] >= row[None]) & ((segment[None] == -1) | (segment[:, None] == segment[None]))
    behind = (1 + vlm_model.VISUAL + torch.arange(SEGMENT)).repeat(count).expand(batch, -1)
    out = net.model.language_model(
        inputs_embeds=torch.cat([first, features, embed(ids.flatten(1))], dim=1),
        attention_mask=visible[None, None].expand(batch, 1, -1, -1),
        position_ids=torch.cat([torch.zeros(batch, 1, dtype=torch.long), places + 1, behind], dim=1),
        use_cache=False,
        output_hidden_states=True,
    )
    states = tuple(s[:, prefix:] for s in out.hidden_states)
    return net.lm_head(out.last_hidden_state[:, prefix:]).unflatten(1, (count, SEGMENT)), states


def action_loss(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross entropy over action words and the end mark, and how often each action word is the expert's."""
    target, scores = ids[:, :, SAID:], logits[:, :, SAID - 1 : -1]
    loss = F.cross_entropy(scores.flatten(0, 2), target.flatten())
    right = (scores.argmax(-1) == target).float().mean(dim=(0, 1)).tolist()
    return loss, dict(zip(("x", "y", "grip"), right, strict=False))


def evaluate(net: Any, *, seed: int, count: int) -> dict[str, float]:
    """Success rate and mean control steps of `count` episodes of a split."""
    went = manipulation.rollout(vla_model.policy(net.eval()), *manipulation.sample(seed, range(count)))
    return {"episodes": count, "success": float(went.success.mean()), "control_steps": float(went.steps.mean())}


class Visited:
    """States that the policy ran into, and the episodes that they belong to."""

    def __init__(self, seed: int) -> None:
        self.seed = manipulation.AGGREGATE_SEED + seed
        self.episodes = np.zeros(0, dtype=np.int64)
        self.states: manipulation.State | None = None
        self.rounds = 0

    def add(self, net: Any, count: int) -> float:
        """Let the policy act in `count` new episodes; returns its success rate."""
        episodes = np.arange(self.rounds * count, (self.rounds + 1) * count)
        went = manipulation.rollout(vla_model.policy(net.eval()), *manipulation.sample(self.seed, episodes))
        for state, running in zip(went.states, went.running, strict=True):
            more = state.take(running)
            self.states = more if self.states is None else manipulation.join(self.states, more)
            self.episodes = np.concatenate([self.episodes, episodes[running]])
        self.rounds += 1
        return float(went.success.mean())

    def draw(self, rng: np.random.Generator, count: int) -> tuple[manipulation.Tables, manipulation.State]:
        """`count` of them."""
        assert self.states is not None
        rows = rng.integers(len(self.episodes), size=count)
        return manipulation.sample(self.seed, self.episodes[rows])[0], self.states.take(rows)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything, for a checkpoint."""
        if self.states is None:
            return {}
        found = {f.name: getattr(self.states, f.name) for f in fields(self.states)}
        found |= {"episodes": self.episodes, "rounds": np.array([self.rounds])}
        return {f"visited.{k}": torch.from_numpy(np.ascontiguousarray(v)) for k, v in found.items()}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """The inverse of `tensors`."""
        found = {k: v.numpy() for k, v in training.without_prefix("visited", tensors).items()}
        if found:
            self.rounds, self.episodes = int(found.pop("rounds")[0]), found.pop("episodes")
            self.states = manipulation.State(**found)


def examples(recipe: VlaRecipe, step: int, visited: Visited) -> tuple[manipulation.Tables, manipulation.State]:
    """The states of one training step: from the expert's noisy episodes, half of them the policy's own once there are some."""
    rng = training.rng(recipe.seed, step)
    own = recipe.batch // 2 if visited.rounds else 0
    fresh = recipe.batch - own
    tables, start = manipulation.sample(
        manipulation.TRAIN_SEED + recipe.seed, np.arange(step * recipe.batch, step * recipe.batch + fresh)
    )
    states, length = manipulation.demonstrate(tables, start, rng, noise=recipe.noise)
    moment = (rng.uniform(size=fresh) * length).astype(int)
    rows = [states[t].take(slice(b, b + 1)) for b, t in enumerate(moment)]
    state = manipulation.State(
        **{f.name: np.concatenate([getattr(r, f.name) for r in rows]) for f in fields(manipulation.State)}
    )
    if own:
        more_tables, more = visited.draw(rng, own)
        tables, state = manipulation.join(tables, more_tables), manipulation.join(state, more)
    return tables, state


def _stage(recipe: VlaRecipe, step: int) -> tuple[str, int, int]:
    """The stage of a step, the step inside its schedule, and that schedule's length; `join` and `drop` share one."""
    if step < recipe.see_steps:
        return "see", step, recipe.see_steps
    step -= recipe.see_steps
    if step < recipe.read_steps:
        return "read", step, recipe.read_steps
    step -= recipe.read_steps
    return ("join" if step < recipe.join_steps else "drop"), step, recipe.join_steps + recipe.drop_steps


def _optimizer(net: Any, heads: Heads, stage: str) -> training.MuonWithAdamW:
    """Fresh optimisers for a stage, over what the stage trains."""
    vision = list(net.model.vision_tower.named_parameters(prefix="model.vision_tower"))
    rest = [(n, p) for n, p in net.named_parameters() if not n.startswith("model.vision_tower")]
    more = list(heads.named_parameters(prefix="heads"))
    named = {"see": vision, "read": rest}.get(stage, vision + rest) + more
    matrices, others = training.split_matrices(named, lambda n: ".layers." in n or "projector" in n)
    return training.MuonWithAdamW(matrices, others)


def train(
    recipe: VlaRecipe, folder: str | Path, *, progress: Callable[[int, int, dict[str, float]], None] | None = None
) -> Any:
    """Run or resume a training in `folder`; returns the trained LLaVA model.

    Raises:
        ValueError: the folder holds a run of another recipe.
    """
    run = training.Run(folder, {"kind": "tiny-vla", **asdict(recipe)})
    torch.manual_seed(recipe.seed)
    net, heads, visited = vla_model.model(tiny.data_folder() / "tiny-vlm").train(), Heads(), Visited(recipe.seed)
    start, steps = 0, recipe.steps()
    optimizer, trained = None, ""
    if (stored := run.load()) is not None:
        tensors, state = stored
        net.load_state_dict(training.without_prefix("net", tensors))
        heads.load_state_dict(training.without_prefix("heads", tensors))
        visited.load_tensors(tensors)
        start, trained = state["step"], state["trained"]
        optimizer = _optimizer(net, heads, trained)
        optimizer.load_tensors(tensors)
    window: list[dict[str, float]] = []
    for step in range(start, steps):
        stage, inner, length = _stage(recipe, step)
        now = "join" if stage == "drop" else stage  # `drop` goes on with the optimisers of `join`
        if now != trained or optimizer is None:
            optimizer, trained = _optimizer(net, heads, now), now
        every = recipe.aggregate_every
        if now == "join" and every and inner and inner % every == 0 and visited.rounds < inner // every:
            won = visited.add(net, recipe.aggregate_episodes)
            run.log(step=step, aggregated=len(visited.episodes), success=won)
            net.train()
        loss, row = _losses(recipe, net, heads, examples(recipe, step, visited), stage, step)
        loss.backward()
        lr = training.warmup_constant_linear(
            inner, steps=length, lr=recipe.join_lr if now == "join" else recipe.lr, warmup=recipe.warmup,
            constant=1.0 if stage == "read" else recipe.constant,
        )  # fmt: skip
        optimizer.step(lr)
        window.append({"loss": loss.item(), **row})
        last = step + 1 == steps
        if (step + 1) % 50 == 0 or last:
            mean = {
                k: float(np.mean([w[k] for w in window if k in w])) for k in dict.fromkeys(k for w in window for k in w)
            }
            window.clear()
            run.log(step=step + 1, stage=stage, lr=lr, **mean)
            if progress:
                progress(step + 1, steps, mean)
        if (step + 1) % CHECKPOINT_EVERY == 0 or last:
            tensors = training.with_prefix("net", net.state_dict()) | training.with_prefix("heads", heads.state_dict())
            run.save(tensors | optimizer.tensors() | visited.tensors(), step=step + 1, trained=trained)
        if (step + 1) % EVALUATE_EVERY == 0 and now == "join":
            score = evaluate(net, seed=manipulation.GATE_SEED, count=32)
            run.log(step=step + 1, quick=score)
            if progress:
                progress(step + 1, steps, score)
            net.train()
    return net.eval()


def _losses(
    recipe: VlaRecipe,
    net: Any,
    heads: Heads,
    batch: tuple[manipulation.Tables, manipulation.State],
    stage: str,
    step: int,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of one batch, and what the log says about it."""
    images, owner = manipulation.render(*batch)
    truth = patch_truth(*batch, owner)
    dropping = stage == "drop" and step % 2 == 1
    with torch.set_grad_enabled(stage != "read" and not dropping):
        patches = net.model.vision_tower(vlm_model.pixels(images), output_hidden_states=True).hidden_states[-2][:, 1:]
    if stage == "see":
        loss = heads.see(patches, truth)
        return loss, {"see": loss.item()}
    keep = None
    if stage == "read" or dropping:
        draw = training.rng(recipe.seed, step, stream=1)
        count = int(draw.choice(recipe.drop_tokens)) if dropping else recipe.read_tokens
        keep = some_tokens(truth["first"], count, draw, bias=1.0)
    asked = ask(*batch)
    logits, states = read(net, net.model.multi_modal_projector(patches), asked.ids, keep)
    loss, row = action_loss(logits, asked.ids)
    aim = heads.aim(states, asked)
    if dropping:
        row = {f"{k}_dropped": v for k, v in row.items()}
    row |= {"actions": loss.item(), "aim": aim.item()}
    loss = loss + recipe.aim * aim
    if stage != "read" and not dropping:
        seen = heads.see(patches, truth)
        loss, row = loss + recipe.eye * seen, row | {"see": seen.item()}
    return loss, row
