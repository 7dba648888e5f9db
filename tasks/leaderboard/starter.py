"""The policy that a comparison starts from: behaviour cloning of filtered episodes (arXiv 2602.21534, section 3.1).

A language model clones its own episodes that earned the full reward. A model from scratch has none, so a demonstrator plays
first: the environment's expert, or a blind choice among its actions, and only episodes with the full reward are kept.
Cloning is the trainer's own: REINFORCE with an advantage of 1 on every kept episode.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

from models.causal_lm import load_policy, load_tokenizer, template_digest, tokenizer_digest
from models.from_scratch import Shape, make_policy
from tasks.arena.environment import (
    Environment,
    Expert,
    Listed,
    Step,
    Task,
    draw_up_to,
    plain_name,
    verifier_digest,
)
from tasks.arena.guarded import StepFault
from tasks.arena.memory import memory_turns
from tasks.core.atomic import whole_directory
from tasks.core.digest import digest_json, digest_tree, sha256_bytes, sha256_file
from tasks.core.errors import Refused, UsageError
from tasks.leaderboard.settings import Start
from tasks.replay.schema import Episode
from tasks.rollout.fresh import may_be_asked, write_episodes
from tasks.rollout.rollout import BehaviourIdentity, reward_components, rollout
from tasks.training.settings import Admission, Guards, TrainingSettings
from tasks.training.shards import ShardRef
from tasks.training.trainer import FINISHED, train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FULL = 1.0  # reward of an episode that is worth cloning
SOURCE = "demonstration"  # of what is shown to a model from scratch
EPOCH = "1970-01-01T00:00:00+00:00"  # a start is a function of its inputs, the time is none of them
_TRIES = 128  # demonstrations at most for each that is wanted: the others do not earn the full reward
_HOPELESS = 4096  # of which not one did
_FAULTS = 20  # demonstrations in a row that the environment did not live through: each may cost as long as a step may take
_TOKENISED = 2000  # episodes from whose texts the vocabulary is made


def start_from_scratch(
    env: Environment, settings: Start, seed: int, folder: Path, without: Collection[str] = ()
) -> Path:
    """Make the start for one environment without a pretrained model; return its directory, made before or now.

    Args:
        without: SHA-256 of prompts that are revoked; they are not shown.

    Raises:
        UsageError: the environment can demonstrate nothing.
        Refused: too few demonstrations earned the full reward.
    """
    shape = Shape(settings.hidden, settings.layers, settings.heads, settings.vocabulary)
    played = demonstrations(env, settings, seed, without)
    policy = folder / "random"
    if not policy.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with whole_directory(policy) as aside:
            make_policy(aside, [_text(task, *turns) for task, turns in played[:_TOKENISED]], shape, seed)
    tokenizer = load_tokenizer(policy)
    who = identity_of("start/scratch", policy)
    episodes = [as_episode(env, tokenizer, who, *one, seed, number) for number, one in enumerate(played)]
    return clone(episodes, policy, settings, seed, folder)


def start_from_own(
    env: Environment,
    policy: Path,
    settings: Start,
    seed: int,
    folder: Path,
    *,
    temperature: float,
    batch_rows: int,
    device: str,
    dtype: str,
    without: Collection[str] = (),
) -> Path:
    """Make the start for one environment from a language model's own episodes; return its directory.

    Args:
        without: SHA-256 of prompts that are revoked; they are not asked.

    Raises:
        Refused: too few of its episodes earn the full reward.
    """
    model, tokenizer = load_policy(policy, device, dtype), load_tokenizer(policy)
    size, kept, played = 8, list[Episode](), 0
    tasks = may_be_asked(draw_up_to(env, "train", 4 * settings.successes, seed), without)
    for group in rollout(
        model, tokenizer, env, tasks, group_size=size, temperature=temperature, seed=seed, batch_rows=batch_rows,
        identity=identity_of("start/own", policy), created_at=EPOCH,
    ):  # fmt: skip
        played += size
        kept += [episode for episode in group if episode.reward >= FULL]
        if len(kept) >= settings.successes:
            break
    if len(kept) < settings.successes:
        raise Refused(
            f"Of {played} episodes of {env.name} only {len(kept)} earned the full reward, and {settings.successes} are "
            "to be cloned; lower arena.start.successes, or choose a better policy."
        )
    alone = [replace(one, group_id=one.episode_id, sample_index=0) for one in kept[: settings.successes]]
    return clone(alone, policy, settings, seed, folder, device, dtype)


def clone(
    episodes: list[Episode],
    policy: Path,
    settings: Start,
    seed: int,
    folder: Path,
    device: str = "cpu",
    dtype: str = "float32",
) -> Path:
    """Train `policy` to write what `episodes` say, each a group of its own with reward 1; return the new directory."""
    path = folder / "demonstrations.parquet"
    write_episodes(path, episodes)
    made = train(
        run_dir=folder / "cloning",
        init_dir=policy,
        shards=[ShardRef(path.name, sha256_file(path))],
        shard_root=folder,
        settings=TrainingSettings(
            objective="reinforce",
            advantage="group_mean",  # a group of one keeps its reward
            admission=Admission(min_reward_std=None),
            guards=Guards(min_ess=0.0, max_kl=1e9),  # it is meant to leave what it said before
            steps=settings.steps,
            groups_per_step=min(16, len(episodes)),
            learning_rate=settings.learning_rate,
            token_budget=2048,
            checkpoint_every=settings.steps,
        ),
        seed=seed,
        device=device,
        dtype=dtype,
    )
    if made.stop_reason != FINISHED:
        raise Refused(
            f"Behaviour cloning ended after {made.steps} updates ({made.stop_reason}); lower arena.start.learning_rate."
        )
    return made.export_dir


def demonstrations(
    env: Environment, settings: Start, seed: int, without: Collection[str] = ()
) -> list[tuple[Task, list[tuple[str, Step]]]]:
    """Play training tasks until enough episodes earned the full reward: [(task, [(action, answer)])].

    An episode in which a guarded `env` hangs, dies or raises is not shown.

    Raises:
        UsageError: the environment can demonstrate nothing. Refused: too few earned the full reward, or it fails again and
            again.
    """
    require_demonstrator(env)
    rng = random.Random(f"{plain_name(env.name)}/demonstrations/{seed}")
    tasks = may_be_asked(draw_up_to(env, "train", settings.demonstrations, seed), without)
    kept: list[tuple[Task, list[tuple[str, Step]]]] = []
    faults = 0
    tries = _TRIES * settings.demonstrations
    played = 0
    for played, task in enumerate(islice(cycle(tasks), tries), start=1):
        try:
            turns = list(_demonstrated(env, task, rng, settings.noise))
        except StepFault as fault:
            faults += 1
            if faults == _FAULTS:
                raise Refused(f"{faults} demonstrations in a row were cut short. {fault}") from None
            continue
        faults = 0
        if turns[-1][1].reward >= FULL:
            kept.append((task, turns))
        if len(kept) == settings.demonstrations:
            return kept
        if played == _HOPELESS and not kept:
            break
    remedy = "lower arena.start.noise" if isinstance(env, Expert) else "it has no expert, so choose another"
    raise Refused(
        f"Of {played} demonstrations of {env.name} only {len(kept)} earned the full reward, and {settings.demonstrations} "
        f"are to be cloned; {remedy}, or set arena.start.policy to a language model."
    )


def require_demonstrator(env: Environment) -> None:
    """Raise UsageError where a model from scratch cannot be shown anything: neither an expert nor a list of actions."""
    if not isinstance(env, Listed | Expert):
        raise UsageError(
            f"{env.name} has neither an expert nor a list of actions that a model from scratch could be shown; set "
            "arena.start.policy to a language model, as champion."
        )


def _demonstrated(
    env: Environment, task: Task, rng: random.Random, noise: float
) -> Iterator[tuple[str, Step]]:
    """Play a task: the expert with a share of random actions, where actions are listed; a blind choice without an expert."""
    actions: list[str] = []
    while len(actions) < env.max_turns:
        action = rng.choice(env.choices(task)) if isinstance(env, Listed) else ""
        if isinstance(env, Expert) and (not action or rng.random() >= noise):
            try:
                action = env.expert(task, actions)
            except UsageError:  # a random action has spoilt the task
                yield action, Step("", done=True)
                return
        actions.append(action)
        step = env.step(task, actions)
        yield action, step
        if step.done:
            return


def _text(task: Task, *turns: tuple[str, Step]) -> str:
    return task.prompt + "".join(f" {action}\n{step.observation}" for action, step in turns)


def as_episode(
    env: Environment,
    tokenizer: PreTrainedTokenizerBase,
    who: BehaviourIdentity,
    task: Task,
    turns: Sequence[tuple[str, Step]],
    seed: int,
    number: int,
) -> Episode:
    """Return what was played as an episode in a group of its own, to be cloned; the actions are what is trained.

    Args:
        turns: (action, the environment's answer).
        number: tells episodes of one task apart.
    """
    encode: Callable[[str], list[int]] = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    ids: list[int] = []
    mask: list[bool] = []
    numbers: list[int] = []
    for turn, (action, step) in enumerate(turns):
        for text, written in ((f" {action}\n", True), (step.observation, False)):
            more = encode(text)
            ids, mask, numbers = ids + more, mask + [written] * len(more), numbers + [turn] * len(more)
    name = digest_json([env.name, task.id, seed, number])[:32]
    return Episode(
        episode_id=f"{name}-0", group_id=name, sample_index=0, task_id=task.id, env=task.env,
        env_version=task.env_version, split=task.split, seed=seed, prompt_ids=encode(task.prompt), response_ids=ids,
        loss_mask=mask, turn_ids=numbers, behaviour_logprobs=[0.0] * len(ids), logprob_source="missing",
        behaviour_version=who.version, behaviour_digest=who.digest, temperature=1.0, top_p=1.0,
        max_new_tokens=env.max_new_tokens, tokenizer_digest=who.tokenizer_digest, template_digest=who.template_digest,
        reward=turns[-1][1].reward, reward_components=reward_components(turns[-1][1], (), memory_turns(env)),
        reward_digest=verifier_digest(env), finish_reason="done", prompt_sha256=sha256_bytes(task.prompt.encode()),
        response_text=_text(task, *turns).removeprefix(task.prompt), source=SOURCE, licence=env.licence,
        created_at=EPOCH,
    )  # fmt: skip


def identity_of(version: str, policy: Path) -> BehaviourIdentity:
    """Who generates: the policy in this directory, called `version`."""
    return BehaviourIdentity(
        version, digest_json(digest_tree(policy)), tokenizer_digest(policy), template_digest(policy)
    )
