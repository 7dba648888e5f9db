from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import advantages, objectives
from tasks.core.digest import digest_files, digest_tree
from tasks.core.errors import Conflict, Corrupt, Refused, Unavailable, UsageError
from tasks.core.locks import file_lock
from tasks.training.settings import (
    ADVANTAGES,
    OBJECTIVES,
    Correction,
    Guards,
    Overlong,
    Penalties,
    TrainingSettings,
)
from tasks.training.stability import find_collapse
from tasks.training.trainer import stop_reason, train
from tests.training.replay import changed, write_shards

LENIENT = Guards(min_ess=0, max_kl=100)
SETTINGS = TrainingSettings(
    steps=6, groups_per_step=2, learning_rate=1e-3, token_budget=64, checkpoint_every=2, guards=LENIENT
)


@pytest.fixture
def options(tmp_path, tiny, episodes):
    return {
        "run_dir": tmp_path / "run",
        "init_dir": tiny,
        "shards": write_shards(tmp_path / "data", episodes),
        "shard_root": tmp_path / "data",
        "settings": SETTINGS,
        "seed": 0,
        "device": "cpu",
        "dtype": "float32",
    }


@pytest.mark.parametrize("objective", objectives.names())
def test_every_objective_raises_the_estimated_reward(options, objective):
    seen: list[dict[str, float]] = []
    clips_in_rounds = "old_logprobs" in objectives.get(objective).needs
    settings = SETTINGS.model_copy(
        update={"objective": objective, "steps": 12, "groups_per_step": 6}
        | ({"updates_per_round": 2} if clips_in_rounds else {})
    )
    result = train(**options | {"settings": settings}, on_metrics=lambda step, m: seen.append(m))
    assert (result.steps, result.stop_reason) == (12, "finished")
    assert seen[0]["ess"] == pytest.approx(1, abs=1e-6)
    assert seen[0]["phi"] == pytest.approx(1, abs=1e-5)
    assert abs(seen[0]["kl_k1"]) < 1e-6
    assert seen[0]["staleness"] == 0
    assert seen[-1]["reward_estimate"] > seen[0]["reward_estimate"] + 0.05
    assert seen[-1]["kl_k3"] > 0
    assert seen[-1]["ess"] < 1
    assert seen[0]["tokens_packed"] < seen[0]["tokens"]


def test_the_export_loads_with_transformers_and_keeps_the_tokenizer(options, tiny):
    result = train(**options)
    assert result.files == digest_tree(result.export_dir)
    assert result.digest == digest_files(result.files)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (result.export_dir / name).read_bytes() == (tiny / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(result.export_dir)
    before = AutoModelForCausalLM.from_pretrained(tiny)
    assert not torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(result.export_dir)("7\n")["input_ids"] == [11, 3]
    assert sorted(result.groups_consumed) == [f"g{i}" for i in range(6)]
    assert not (options["run_dir"] / "checkpoints").exists()


def test_a_finished_run_is_returned_and_not_repeated(options):
    first = train(**options)
    called = []
    assert train(**options, on_metrics=lambda step, m: called.append(step)) == first
    assert not called
    with pytest.raises(Conflict, match="other weights, shards, settings or seed"):
        train(**options | {"seed": 1})
    weights = first.export_dir / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(Corrupt, match=r"model\.safetensors differs"):
        train(**options)


def test_micro_batches_make_no_difference(options, tmp_path):
    whole = SETTINGS.model_copy(update={"token_budget": 10_000})
    a = train(**options)
    b = train(**options | {"settings": whole, "run_dir": tmp_path / "b"})
    for x, y in zip(
        *(AutoModelForCausalLM.from_pretrained(r.export_dir).parameters() for r in (a, b)), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=2e-4)


DRIVER = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tasks.training.settings import TrainingSettings
from tasks.training.shards import ShardRef
from tasks.training.trainer import train
o = json.loads(sys.argv[1])
o |= {k: Path(o[k]) for k in ("run_dir", "init_dir", "shard_root")}
o |= {"settings": TrainingSettings(**o["settings"]), "shards": [ShardRef(**s) for s in o["shards"]]}
print("digest", train(**o, on_metrics=lambda step, m: print("step", step, flush=True)).digest)
"""


def _start(options, run_dir: Path) -> subprocess.Popen[str]:
    plain = options | {"run_dir": run_dir, "settings": options["settings"].model_dump()}
    plain["shards"] = [asdict(s) for s in options["shards"]]
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps(plain, default=str)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def _run(options, run_dir: Path, kill_at: int | None = None) -> tuple[list[int], str | None]:
    """Steps that were made, and the digest if the run came to its end; SIGKILL right after step `kill_at`."""
    steps = []
    with _start(options, run_dir) as process:
        assert process.stdout is not None
        for line in process.stdout:
            word, value = line.split()
            if word == "digest":
                return steps, value
            steps.append(int(value))
            if steps[-1] == kill_at:
                process.send_signal(signal.SIGKILL)
    return steps, None


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(options, tmp_path):
    options |= {"settings": SETTINGS.model_copy(update={"steps": 7})}
    steps, want = _run(options, tmp_path / "straight")
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    killed = tmp_path / "killed"
    assert _run(options, killed, kill_at=3)[1] is None
    # Bytes that went bad in the newest checkpoint: it is noticed and the one before, or the start, is used.
    assert _run(options, killed, kill_at=5)[0][0] == 3
    newest = sorted((killed / "checkpoints").glob("step-*"))[-1] / "moments.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    steps, got = _run(options, killed)
    assert steps == [3, 4, 5, 6, 7]
    assert got == want


def _stops(options, guards: Guards):
    fast = {"learning_rate": 3e-2, "objective": "reinforce", "checkpoint_every": 1}
    settings = SETTINGS.model_copy(update={"guards": guards, **fast})
    seen = []
    result = train(**options | {"settings": settings}, on_metrics=lambda step, m: seen.append(m))
    return result, seen


@pytest.mark.parametrize(
    ("guards", "reason"),
    [(Guards(min_ess=0.9, max_kl=1e9), "ess_collapse"), (Guards(min_ess=0, max_kl=0.01), "kl_blow_up")],
)
def test_a_guard_stops_and_exports_the_last_good_checkpoint(options, guards, reason, tmp_path):
    result, seen = _stops(options, guards)
    assert result.stop_reason == reason
    assert stop_reason(seen[-1], guards) == reason
    assert stop_reason(seen[-2], guards) is None
    assert result.steps == len(seen) - 2  # the last update measured is bad, so is the update that led to it
    shutil.rmtree(options["run_dir"])
    if result.steps:
        shorter = SETTINGS.model_copy(
            update={"learning_rate": 3e-2, "objective": "reinforce", "steps": result.steps}
        )
        assert train(**options | {"settings": shorter}).digest == result.digest


def test_nan_stops_before_the_update_and_leaves_the_initial_weights(options, tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    model.save_pretrained(broken)
    result = train(**options | {"init_dir": broken})
    assert (result.steps, result.stop_reason) == (0, "not_finite")
    json.dumps(result.metrics, allow_nan=False)


@pytest.mark.parametrize("name", ["loss", "grad_norm", "ess", "kl_k3"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_trips_a_guard_whatever_the_limits(name, value):
    numbers = {"loss": 0.0, "grad_norm": 1.0, "ess": 1.0, "kl_k3": 0.0}
    assert stop_reason(numbers, Guards()) is None
    assert stop_reason(numbers | {name: value}, LENIENT) == "not_finite"


def test_a_run_goes_on_with_the_threads_it_began_with(options, tmp_path):
    """The last bits of a product depend on how it is split over threads."""

    class Crash(Exception):
        pass

    def crash(step, metrics):
        if step == 3:
            raise Crash

    straight = train(**options)
    again = options | {"run_dir": tmp_path / "again"}
    with pytest.raises(Crash):
        train(**again, on_metrics=crash)
    seen = []
    try:
        torch.set_num_threads(2)
        resumed = train(**again, on_metrics=lambda step, m: seen.append(torch.get_num_threads()))
    finally:
        torch.set_num_threads(1)
    assert seen == [1] * 4
    assert resumed.digest == straight.digest


def test_groups_without_a_trained_token_are_not_drawn(options, episodes, tmp_path):
    silent = episodes
    for at, episode in enumerate(episodes):
        if episode.group_id == "g1":
            silent = changed(silent, at, loss_mask=[False] * len(episode.response_ids))
    shards = write_shards(tmp_path / "silent", silent)
    one = SETTINGS.model_copy(update={"groups_per_step": 1})
    result = train(**options | {"shards": shards, "shard_root": tmp_path / "silent", "settings": one})
    assert (result.steps, result.stop_reason) == (6, "finished")
    assert "g1" not in result.groups_consumed
    assert result.metrics["groups_refused_no_tokens"] == 1


def test_answers_that_were_cut_off_teach_nothing_where_the_settings_say_so(options, episodes, tmp_path):
    cut = episodes
    for at in range(0, len(episodes), 3):
        cut = changed(cut, at, finish_reason="length")
    data = {"shards": write_shards(tmp_path / "cut", cut), "shard_root": tmp_path / "cut"}
    kept, masked = (
        train(
            **options
            | data
            | {
                "run_dir": tmp_path / str(mask),
                "settings": SETTINGS.model_copy(
                    update={"groups_per_step": 6, "steps": 1, "overlong": Overlong(mask=mask)}
                ),
            }
        )
        for mask in (False, True)
    )
    tokens = [sum(e.loss_mask) for e in cut]
    assert kept.metrics["tokens_trained"] == sum(tokens)
    assert masked.metrics["tokens_trained"] == sum(n for at, n in enumerate(tokens) if at % 3)
    assert kept.metrics["reward"] == masked.metrics["reward"]


def test_reinforce_trains_on_rows_without_logprobs(options, episodes, tmp_path):
    bare = episodes
    for at, episode in enumerate(episodes):
        zeros = [0.0] * len(episode.response_ids)
        bare = changed(bare, at, logprob_source="missing", behaviour_logprobs=zeros)
    shards = write_shards(tmp_path / "bare", bare)
    options |= {"shards": shards, "shard_root": tmp_path / "bare"}
    with pytest.raises(Refused, match="Column logprob_source: 24 of 24"):
        train(**options)
    result = train(**options | {"settings": SETTINGS.model_copy(update={"objective": "reinforce"})})
    assert result.stop_reason == "finished"
    assert result.metrics["ess"] == pytest.approx(1)


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(options, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tasks.training.checkpoint.save_file", full)
    with pytest.raises(Unavailable, match=r"full: step-00000002 was not written"):
        train(**options)
    assert not list(options["run_dir"].rglob("*.safetensors"))
    monkeypatch.undo()
    assert train(**options).stop_reason == "finished"


def test_only_one_process_works_in_a_run(options):
    with file_lock(options["run_dir"] / ".lock"), pytest.raises(Conflict, match="already working"):
        train(**options)


def test_wrong_requests(options, tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(Unavailable, match="no GPU"):
            train(**options | {"device": "cuda"})
    with pytest.raises(UsageError, match="cannot be read"):
        train(**options | {"init_dir": tmp_path / "nothing"})
    assert not (tmp_path / "run" / "export").exists()


def test_bfloat16_is_the_same_code(options):
    seen: list[dict[str, float]] = []
    result = train(**options | {"dtype": "bfloat16"}, on_metrics=lambda step, m: seen.append(m))
    assert result.stop_reason == "finished"
    assert 0 < abs(seen[0]["kl_k1"]) < 0.05
    assert AutoModelForCausalLM.from_pretrained(result.export_dir).dtype == torch.float32


def test_names_of_the_settings_are_those_of_the_registries():
    assert set(OBJECTIVES) == set(objectives.names())
    assert set(ADVANTAGES) == set(advantages.names())
    assert set(Correction.model_fields["weight"].annotation.__args__) == {"none", *objectives.WEIGHTS}
    assert Penalties.model_fields["kl_estimator"].annotation.__args__ == objectives.KL_ESTIMATORS
    assert TrainingSettings.model_fields["aggregation"].annotation.__args__ == objectives.AGGREGATIONS


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="no objective vespa; did you mean vespo"):
        TrainingSettings(objective="vespa")
    with pytest.raises(ValueError, match="no advantage gigppo; did you mean gigpo"):
        TrainingSettings(advantage="gigppo")


WILD = TrainingSettings(  # the policy leaves its data behind within ten updates
    objective="cispo",
    steps=30,
    groups_per_step=2,
    learning_rate=3e-3,
    grad_clip=100.0,
    token_budget=64,
    checkpoint_every=2,
)


def wild(**guards: object) -> TrainingSettings:
    return WILD.model_copy(update={"guards": Guards(min_ess=0, max_kl=1e9, **guards)})  # type: ignore[arg-type]


def test_a_collapse_is_only_reported_unless_the_settings_say_more(options):
    seen = []
    result = train(
        **options | {"settings": wild()}, on_metrics=lambda step, m: seen.append({"step": step, **m})
    )
    assert (result.stop_reason, result.steps) == ("finished", 30)
    assert find_collapse(seen)[0].driver == "policy drift"
    assert {row["reacted"] for row in seen} == {0.0}


def test_a_run_that_collapses_ends_with_the_weights_from_before(options, tmp_path):
    seen = []
    settings = wild(collapse="stop")
    result = train(
        **options | {"settings": settings}, on_metrics=lambda step, m: seen.append({"step": step, **m})
    )
    (found,) = find_collapse(seen)
    assert result.stop_reason == "collapse"
    assert result.steps == 4 < found.onset == 5
    short = wild().model_copy(update={"steps": 4})
    four = train(**options | {"run_dir": tmp_path / "four", "settings": short})
    assert result.files["model.safetensors"] == four.files["model.safetensors"]


@pytest.mark.parametrize("remedy", ["mask", "raise_kl"])
def test_a_remedy_changes_the_loss_from_the_next_round_on(options, remedy, tmp_path):
    seen, plain = [], []
    for settings, rows, name in ((wild(collapse=remedy), seen, "a"), (wild(), plain, "b")):
        train(
            **options | {"settings": settings, "run_dir": tmp_path / name},
            on_metrics=lambda step, m, rows=rows: rows.append(m),
        )
    assert [row["reacted"] for row in seen[:9]] == [0.0] * 7 + [1.0] * 2
    same = [row["loss"] for row in seen[:7]] == [row["loss"] for row in plain[:7]]
    if remedy == "mask":
        assert same
        # Which answers are masked from then on depends on how far they have gone.
        assert [row["loss"] for row in seen[7:]] != [row["loss"] for row in plain[7 : len(seen)]]
    else:
        assert same
        assert seen[7]["kl_reference"] > 0
        assert "kl_reference" not in plain[7]


def test_a_run_that_rolls_back_goes_on_from_before_the_onset_and_survives_kills(options, tmp_path):
    settings = wild(collapse="mask", roll_back=True)
    steps = []
    straight = train(**options | {"settings": settings}, on_metrics=lambda step, m: steps.append(step))
    back = next(n for n, (a, b) in enumerate(pairwise(steps)) if b <= a)
    assert (steps[back], steps[back + 1]) == (7, 5)  # told at 7, good until 4

    class Crash(Exception):
        pass

    for kill in (3, back + 1, back + 4):  # before, right after the way back, and on the new way
        calls = 0

        def crash(step, metrics, kill=kill):
            nonlocal calls
            calls += 1
            if calls == kill:
                raise Crash

        again = options | {"settings": settings, "run_dir": tmp_path / f"killed-{kill}"}
        with pytest.raises(Crash):
            train(**again, on_metrics=crash)
        resumed = train(**again)
        assert (resumed.digest, resumed.steps, resumed.stop_reason) == (
            straight.digest,
            straight.steps,
            straight.stop_reason,
        )


def test_rolling_back_alone_is_refused():
    with pytest.raises(ValueError, match="would collapse again"):
        Guards(collapse="stop", roll_back=True)
