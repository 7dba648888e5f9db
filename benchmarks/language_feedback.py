"""Does a policy learn to use what a teacher says? True feedback against shuffled feedback, and against no feedback at all.

    python -m benchmarks.language_feedback [--topics letter thing] [--seeds 0 1 2 3 4] [--workers 2]

A Llama of 0.1 M parameters talks with the scripted teacher of `tasks.arena.feedback`, by the product's own parts
(rollout, trainer, advantages, Q-priming). `letter` asks for one of seven letters in three turns, the teacher says
"later" or "earlier": bisection always finds it, and blind guesses without repetition find three in seven. `thing` asks
for one of eight things in four turns; a wrong guess is only called wrong, yes-or-no questions are answered: three
questions and a guess always find it, blind guesses one in two.

A seed starts from behaviour cloning: of a demonstrator who heeds the teacher in half of its turns (letter), or never
asks anything (thing). Then, all for the same number of updates:

- true: GRPO's advantage on whole conversations with the truthful teacher, success in turn t worth 0.7^(t - 1);
- shuffled: the same, the teacher speaks of another task;
- single turn: the same on conversations of one turn, with more groups for about as many tokens;
- SFT: cloning of the start's own successful conversations with the truthful teacher;
- questions: Q-priming, that is cloning of successful conversations in which questions have replaced wrong guesses;
  "questions + true" goes on from there with RL as "true" does from the start, so its gain over "true" is what Q-priming
  pays, its cloning included, which is extra. A gain would ask for a control that clones as long without questions.

Every policy is judged with the truthful and with the shuffled teacher, sampled at temperature 1 on the same held-out
tasks, in conversations of up to twice as many turns as in training.

`thing` is not run by default. Its cloning of questions has an own number of updates: with 30 instead of 100 a policy of
this size forgets the form of an action, and RL then only repairs that.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import lab
from models.advantages import Outcomes, get
from models.causal_lm import load_policy, load_tokenizer, template_digest, tokenizer_digest
from models.from_scratch import Shape, make_policy
from models.machine import describe
from tasks.arena.environment import Step, Task
from tasks.arena.feedback import Feedback, success_by_turn, transcript, turns_to_success
from tasks.arena.priming import primed
from tasks.arena.teachers import Scripted, ThingQuestions
from tasks.arena.topics import Ordered, Thing, Topic, is_question, possible
from tasks.core.digest import digest_json, digest_tree, sha256_file
from tasks.core.settings import Collect
from tasks.leaderboard.settings import Start
from tasks.leaderboard.starter import as_episode, clone
from tasks.replay.schema import Episode
from tasks.rollout.fresh import Sampling, fresh_source, write_episodes
from tasks.rollout.rollout import BehaviourIdentity, attempts, rollout
from tasks.rollout.writing import Writer
from tasks.training.settings import Admission, Guards, Mixture, TrainingSettings
from tasks.training.shards import ShardRef
from tasks.training.trainer import train

GAMMA = 0.7
GROUP = 8
RATE = 1e-3
HELD_OUT, SAMPLES = 150, 2
EPOCH = "1970-01-01T00:00:00+00:00"
OUT = lab.OUT / "language_feedback_work"


@dataclass(frozen=True, slots=True)
class Setting:
    """What differs between the topics. `heed`: share of the demonstrator's turns in which it goes by what was said;
    `groups` of an update, and of one with conversations of one turn; `priming`, updates of cloning questions; `arms`
    with the start they go on from."""

    topic: Topic
    turns: int
    heed: float
    cloning: int
    updates: int
    groups: int
    groups_single: int
    priming: int
    arms: Mapping[str, str]


SETTINGS = {
    "letter": Setting(
        Ordered("letter", tuple("abcdefg"), "letter", "later", "earlier"),
        turns=3, heed=0.5, cloning=500, updates=80, groups=16, groups_single=32, priming=0,
        arms={"true": "start", "shuffled": "start", "single turn": "start", "SFT": "start"},
    ),
    "thing": Setting(
        Thing(), turns=4, heed=0.0, cloning=200, updates=30, groups=8, groups_single=40, priming=100,
        arms={
            "true": "start",
            "questions": "start",
            "questions + true": "questions",
        },
    ),
}  # fmt: skip


def environment(setting: Setting, kind: str, turns: int) -> Feedback:
    shuffled = kind == "shuffled"
    prefix = "feedback_shuffled" if shuffled else "feedback"
    return Feedback(setting.topic, Scripted(setting.topic), prefix, shuffled, turns)


def identity(policy: Path) -> BehaviourIdentity:
    digest = digest_json(digest_tree(policy))
    return BehaviourIdentity("agent/0", digest, tokenizer_digest(policy), template_digest(policy))


# The start


def demonstrated(
    env: Feedback, heed: float, count: int, seed: int
) -> list[tuple[Task, list[tuple[str, Step]]]]:
    """Conversations of a demonstrator who guesses, in a share of the turns among what was said to be possible."""
    rng = random.Random(f"demonstrations/{seed}")
    found = []
    for task in env.tasks("train", count, seed + 1000):
        actions: list[str] = []
        steps: list[Step] = []
        while not (steps and steps[-1].done):
            guesses = [action for action in env.choices(task) if not is_question(action)]
            if rng.random() < heed:
                guesses = possible(env.topic, task.payload, env.said(task, actions))
            actions.append(rng.choice(guesses))
            steps.append(env.step(task, actions))
        found.append((task, list(zip(actions, steps, strict=True))))
    return found


def start(setting: Setting, seed: int, folder: Path, updates: int) -> Path:
    env = environment(setting, "true", setting.turns)
    played = demonstrated(env, setting.heed, 2048, seed)
    texts = [transcript(task.prompt, turns) for task, turns in played]
    policy = make_policy(folder / "random", texts, Shape(), seed)
    model, tokenizer = load_policy(policy), load_tokenizer(policy)
    with (
        torch.no_grad()
    ):  # at the usual 0.02 so small a model takes several times as long to attend to anything
        for weights in model.parameters():
            if weights.dim() == 2:
                weights *= 3
    model.save_pretrained(policy)
    who = identity(policy)
    episodes = [
        # What failed is cloned as well: the demonstrator shows a manner, not the way to success.
        replace(as_episode(env, tokenizer, who, task, turns, seed, number), reward=1.0)
        for number, (task, turns) in enumerate(played)
    ]
    return clone(episodes, policy, Start(steps=updates), seed, folder)


# The arms


def learn(
    setting: Setting, arm: str, policy: Path, seed: int, folder: Path, updates: int
) -> tuple[Path, dict[str, Any]]:
    """Train `policy` as the arm says; where the result is, and what the training sampled."""
    if arm in ("SFT", "questions"):
        episodes, tokens = sft_data(setting, arm, policy, seed, updates)
        kept = [replace(one, group_id=one.episode_id, sample_index=0) for one in episodes if one.reward >= 1]
        export = imitate(kept, policy, seed, folder, updates, GROUP * setting.groups)
        return export, {"tokens": tokens, "cloned": len(kept), "punished": None}
    kind = "shuffled" if "shuffled" in arm else "true"
    single = arm == "single turn"
    env = environment(setting, kind, 1 if single else setting.turns)
    groups = setting.groups_single if single else setting.groups
    tokenizer = load_tokenizer(policy)
    first = folder / "first.parquet"
    tasks = env.tasks(
        "train", GROUP, seed
    )  # the trainer wants a sealed shard; with all groups fresh it is not learnt from
    group = rollout(
        load_policy(policy), tokenizer, env, tasks, group_size=GROUP, temperature=1.0, seed=seed,
        batch_rows=512, identity=identity(policy), created_at=EPOCH,
    )  # fmt: skip
    write_episodes(first, [episode for one in group for episode in one])
    sampling = Sampling(
        key=f"{arm}/{seed}",
        start=identity(policy),
        settings=Collect(environments={env.name: 1}, group_size=GROUP, temperature=1.0, batch_rows=512),
        seed=seed,
        environment=lambda name: env,
        root=folder,
        folder=folder / "fresh",
        created_at=EPOCH,
    )
    made = train(
        run_dir=folder / "run",
        init_dir=policy,
        shards=[ShardRef(first.name, sha256_file(first))],
        shard_root=folder,
        settings=TrainingSettings(
            objective="reinforce",  # on-policy, one update a round: GRPO's loss without its clipping, which never acts
            advantage="group_norm_discounted",
            advantage_options={"gamma": GAMMA},
            mixture=Mixture(schedule="constant", fresh=1.0),
            admission=Admission(min_reward_std=None),
            guards=Guards(min_ess=0.0, max_kl=100.0),
            steps=updates,
            groups_per_step=groups,
            learning_rate=RATE,
            token_budget=4096,
            checkpoint_every=updates,
        ),
        seed=seed,
        device="cpu",
        dtype="float32",
        fresh=fresh_source(sampling, tokenizer),
    )
    sampled = [sampled_by(folder / shard.path) for shard in made.fresh]
    successes = sum(one["successes"] for one in sampled)
    return made.export_dir, {
        "tokens": sum(one["tokens"] for one in sampled),
        "cloned": None,
        "punished": sum(one["punished"] for one in sampled) / max(successes, 1),
    }


def sft_data(setting: Setting, arm: str, policy: Path, seed: int, updates: int) -> tuple[list[Episode], int]:
    """As many conversations of the policy as RL would sample, and the tokens that the policy wrote in them."""
    env = environment(setting, "true", setting.turns)
    model, tokenizer = load_policy(policy), load_tokenizer(policy)
    who, count = identity(policy), updates * setting.groups
    if arm == "SFT":
        tasks = env.tasks("train", count, seed)
        groups = rollout(
            model, tokenizer, env, tasks, group_size=GROUP, temperature=1.0, seed=seed, batch_rows=512,
            identity=who, created_at=EPOCH,
        )  # fmt: skip
        episodes = [episode for group in groups for episode in group]
        return episodes, sum(sum(one.loss_mask) for one in episodes)
    writer = Writer(model, tokenizer, env.max_new_tokens, temperature=1.0, seed=seed)
    tasks = env.tasks("train", 2 * count, seed)
    found = primed(env, tasks, writer, ThingQuestions(), seed=seed)
    episodes = [
        as_episode(
            env, tokenizer, who, one.task, list(zip(one.actions, one.steps, strict=True)), seed, number
        )
        for number, one in enumerate(found)
    ]
    return episodes, sum(sum(one.loss_mask) for one in episodes)


def imitate(episodes: list[Episode], policy: Path, seed: int, folder: Path, updates: int, batch: int) -> Path:
    write_episodes(folder / "kept.parquet", episodes)
    return train(
        run_dir=folder / "run",
        init_dir=policy,
        shards=[ShardRef("kept.parquet", sha256_file(folder / "kept.parquet"))],
        shard_root=folder,
        settings=TrainingSettings(
            objective="reinforce",
            advantage="group_mean",  # a group of one keeps its reward, 1
            admission=Admission(min_reward_std=None),
            guards=Guards(min_ess=0.0, max_kl=100.0),
            steps=updates,
            groups_per_step=min(batch, len(episodes)),
            learning_rate=RATE,
            token_budget=4096,
            checkpoint_every=updates,
        ),
        seed=seed,
        device="cpu",
        dtype="float32",
    ).export_dir


def sampled_by(path: Path) -> dict[str, int]:
    """Of one shard of fresh groups: tokens written, successes, and successes with an advantage below 0."""
    rows = pq.read_table(path, columns=["group_id", "reward", "loss_mask", "turn_ids"]).to_pylist()
    groups = {name: place for place, name in enumerate(dict.fromkeys(row["group_id"] for row in rows))}
    turns = [row["turn_ids"][-1] + 1 for row in rows]
    outcomes = Outcomes(
        torch.tensor([row["reward"] for row in rows], dtype=torch.float64),
        torch.tensor([groups[row["group_id"]] for row in rows]),
        torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(turns)),
        torch.tensor([turn for count in turns for turn in range(count)]),
    )
    advantages = get("group_norm_discounted").estimate(outcomes, gamma=GAMMA)
    below = {t for t, a in zip(outcomes.trajectory.tolist(), advantages.tolist(), strict=True) if a < 0}
    return {
        "tokens": sum(sum(row["loss_mask"]) for row in rows),
        "successes": sum(row["reward"] == 1 for row in rows),
        "punished": sum(rows[place]["reward"] == 1 for place in below),
    }


# The judgement


def judged(setting: Setting, policy: Path, seed: int) -> dict[str, Any]:
    """With each teacher: success by turn up to twice the turns, turns to success, shares of fixed rules."""
    model, tokenizer = load_policy(policy), load_tokenizer(policy)
    found: dict[str, Any] = {}
    for kind in ("true", "shuffled"):
        env = environment(setting, kind, 2 * setting.turns)
        played = attempts(
            model, tokenizer, env, env.tasks("heldout", HELD_OUT, 0), samples=SAMPLES, temperature=1.0,
            seed=seed, batch_rows=512,
        )  # fmt: skip
        episodes = [one for group in played for one in group]
        solved = [one.turns if one.reward >= 1 else None for one in episodes]
        found[kind] = {
            "by_turn": success_by_turn(solved, env.max_turns),
            "turns": turns_to_success(
                [turn if turn and turn <= setting.turns else None for turn in solved], setting.turns
            ),
            **{
                name: float(np.mean([one.components[name] for one in episodes]))
                for name in ("valid_format", "repeated", "questions", "premature")
            },
        }
    return found


def cell(settings: dict[str, Any]) -> dict[str, Any]:
    """All arms of one topic and seed, so that they share their start: {arm: {judged, tokens, cloned, punished}}."""
    setting, seed = SETTINGS[settings["topic"]], settings["seed"]
    folder = OUT / f"{settings['topic']}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    policies = {"start": start(setting, seed, folder / "start", settings["cloning"])}
    found: dict[str, Any] = {"start": {"judged": judged(setting, policies["start"], seed)}}
    for arm, begin in setting.arms.items():
        place = folder / arm.replace(" ", "")
        place.mkdir(parents=True)
        updates = settings["priming" if arm == "questions" else "updates"]
        policies[arm], told = learn(setting, arm, policies[begin], seed, place, updates)
        found[arm] = {"judged": judged(setting, policies[arm], seed), **told}
    shutil.rmtree(folder)
    return {"arms": found}


def success(one: Mapping[str, Any], turns: int, kind: str = "true") -> float:
    return one["judged"][kind]["by_turn"][turns - 1]


def summarise(results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each topic and arm; differences are paired by seed."""
    rows = []
    for topic in dict.fromkeys(one["settings"]["topic"] for one in results.values()):
        runs = [one["arms"] for one in results.values() if one["settings"]["topic"] == topic]
        turns = SETTINGS[topic].turns

        def column(arm: str, kind: str = "true", runs: Any = runs, turns: int = turns) -> list[float]:
            return [success(run[arm], turns, kind) for run in runs]

        def heeded(arm: str) -> list[float]:
            return [a - b for a, b in zip(column(arm), column(arm, "shuffled"), strict=True)]

        for arm in runs[0]:
            own = [run[arm] for run in runs]
            row: dict[str, Any] = {
                "topic": topic,
                "arm": arm,
                "by_turn": np.mean([one["judged"]["true"]["by_turn"] for one in own], 0).tolist(),
                "by_turn_shuffled": np.mean(
                    [one["judged"]["shuffled"]["by_turn"] for one in own], 0
                ).tolist(),
                "success": lab.interval(column(arm)),
                "success_shuffled": lab.interval(column(arm, "shuffled")),
                "successes": column(arm),
                "turns": lab.interval([one["judged"]["true"]["turns"] for one in own]),
                "turns_from_start": lab.difference(
                    [one["judged"]["true"]["turns"] for one in own],
                    [run["start"]["judged"]["true"]["turns"] for run in runs],
                ),
                "heeded": lab.difference(heeded(arm), [0.0] * len(runs)),
                "from_start": lab.difference(column(arm), column("start")),
                "heeded_from_start": lab.difference(heeded(arm), heeded("start")),
                "questions": float(np.mean([one["judged"]["true"]["questions"] for one in own])),
                "premature": float(np.mean([one["judged"]["true"]["premature"] for one in own])),
                "repeated": float(np.mean([one["judged"]["true"]["repeated"] for one in own])),
            }
            if arm != "start":
                row["tokens"] = float(np.mean([one["tokens"] for one in own]))
                for name in ("cloned", "punished"):
                    values = [one[name] for one in own if one[name] is not None]
                    row[name] = float(np.mean(values)) if values else None
            control = arm.replace("true", "shuffled")
            if control != arm and control in runs[0]:
                row["from_shuffled"] = lab.difference(column(arm), column(control))
            unprimed = arm.removeprefix("questions + ")
            if unprimed != arm:
                row["from_unprimed"] = lab.difference(column(arm), column(unprimed))
                row["heeded_from_unprimed"] = lab.difference(heeded(arm), heeded(unprimed))
            rows.append(row)
    return rows


def show(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    for topic in dict.fromkeys(row["topic"] for row in rows):
        turns = SETTINGS[topic].turns
        table = Table(
            title=f"{topic}: success in {turns} turns, mean over seeds ± 95 %, differences paired by seed",
            caption="* the interval excludes 0",
        )
        for name in (
            "arm",
            "true",
            "shuffled",
            "true - shuffled teacher",
            "minus start",
            "RL true - RL shuffled",
            "primed - not",
        ):
            table.add_column(name)
        for name in ("turns", "minus start", f"success in {2 * turns}", "asks", "premature", "tokens"):
            table.add_column(name)
        for row in rows:
            if row["topic"] != topic:
                continue
            start_row = row["arm"] == "start"
            table.add_row(
                row["arm"],
                *(f"{row[name][0]:.3f}±{row[name][1]:.3f}" for name in ("success", "success_shuffled")),
                lab.mark(row["heeded"], 1),
                "" if start_row else lab.mark(row["from_start"], 1),
                *(
                    lab.mark(row[name], 1) if name in row else ""
                    for name in ("from_shuffled", "from_unprimed")
                ),
                f"{row['turns'][0]:.2f}±{row['turns'][1]:.2f}",
                "" if start_row else lab.mark(row["turns_from_start"], 1),
                f"{row['by_turn'][-1]:.3f}",
                f"{row['questions']:.2f}",
                f"{row['premature']:.2f}",
                "" if start_row else f"{row['tokens']:.0f}",
            )
        console.print(table)


def draw_curves(rows: Sequence[Mapping[str, Any]]) -> Any:
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "forebay"
    from matplotlib import pyplot

    topics = list(dict.fromkeys(row["topic"] for row in rows))
    figure, axes = pyplot.subplots(1, len(topics), figsize=(5 * len(topics), 3.6), sharey=True, squeeze=False)
    for axis, topic in zip(axes[0], topics, strict=True):
        setting = SETTINGS[topic]
        env = environment(setting, "true", 1)
        blind = env.retry_baseline(env.tasks("heldout", 10, 0))
        numbers = range(1, 2 * setting.turns + 1)
        axis.plot(
            numbers, [min(1.0, blind * turn) for turn in numbers], "k:", lw=1, label="blind, never repeated"
        )
        axis.axvline(setting.turns, color="0.85", zorder=0)
        for row in rows:
            if row["topic"] == topic:
                axis.plot(numbers, row["by_turn"], marker=".", label=row["arm"])
        axis.set(title=topic, xlabel="turn", ylim=(0, 1.02))
        axis.legend(fontsize=7, loc="lower right")
    axes[0][0].set_ylabel("solved by then")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = lab.parser(__doc__, seeds=5)
    parser.add_argument("--topics", nargs="+", choices=SETTINGS, default=["letter"])
    words = parser.parse_args(arguments)
    seeds = words.seeds[:1] if words.quick else words.seeds
    cells = {
        f"{topic}-{seed}{'-quick' if words.quick else ''}": {
            "topic": topic,
            "seed": seed,
            "cloning": 60 if words.quick else SETTINGS[topic].cloning,
            "updates": 2 if words.quick else SETTINGS[topic].updates,
            "priming": 2 if words.quick else SETTINGS[topic].priming,
        }
        for topic in words.topics
        for seed in seeds
    }
    rows = summarise(lab.run("language_feedback", cell, cells, workers=words.workers, fresh=words.fresh))
    summary = {"machine": describe(), "code": lab.code(), "seeds": seeds, "rows": rows}
    name = "_".join(["language_feedback", *(topic for topic in words.topics if topic != "letter")])
    lab.keep(name, summary, draw_curves(rows), save=words.save)
    if words.json:
        print(json.dumps(summary))
    else:
        show(rows, Console(width=170))


if __name__ == "__main__":
    main()
