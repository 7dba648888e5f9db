"""How fast replay of a million rows is opened and read, next to Hugging Face `datasets` and to what the trainer eats.

    python -m benchmarks.replay_throughput [--rows N] [--seconds N] [--json PATH] [--save]

The rows are made up (groups of 8, about 64 + 32 tokens) and written by the product's own shard writer. Every
contestant is a process of its own: `decode` opens the dataset for the first time, `forebay` opens what is decoded,
draws groups with the trainer's sampler and reads them as `Episodes`; `datasets` maps its own Arrow copy of the
same columns and reads the same groups in the same order, as lists, as numpy arrays and as Arrow tables, by row numbers
and by one slice a group (the order is given, drawing it is not in its time). All end with a value a row: Arrow tables are
put together in one piece of memory, since a slice alone reads nothing, and their lists of numbers cut into an array a
row, which is what a trainer packs. Its best of the six counts. Files are
in the page cache for all of them. The trainer's figure is one update's gradient (VESPO) on random weights of
SmolLM2-135M's shape.

Memory: `anonymous` is what a process allocates, `mapped` are pages of files that the kernel may drop at any time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import Progress

from models.machine import describe
from tasks.core.atomic import write_file_atomic
from tasks.core.digest import sha256_file
from tasks.core.settings import Replay as ReplaySettings
from tasks.replay.schema import arrow_schema
from tasks.replay.shards import _write_parquet

HERE = Path(__file__).parent
BASELINE = HERE / "baselines" / "replay_throughput.json"
GROUP, VOCABULARY, GROUPS_PER_STEP = 8, 49152, 8
TOKENIZER = "7" * 64
PEERS = tuple(f"{kind}-{access}" for kind in ("lists", "numpy", "arrow") for access in ("rows", "slices"))
TOKENS = ("prompt_ids", "response_ids")
LISTS = (*TOKENS, "loss_mask", "turn_ids", "behaviour_logprobs")
COLUMNS = [
    "group_id",
    "prompt_ids",
    "response_ids",
    "loss_mask",
    "turn_ids",
    "behaviour_logprobs",
    "behaviour_version",
    "temperature",
    "reward",
    "response_text",
]


def make_table(first_group: int, groups: int, rng: np.random.Generator) -> pa.Table:
    """Rows of the schema, drawn without a loop over them."""
    rows = groups * GROUP
    group = np.repeat(np.arange(first_group, first_group + groups), GROUP)
    index = np.tile(np.arange(GROUP, dtype=np.int32), groups)
    prompt = np.repeat(rng.integers(48, 81, groups), GROUP)
    width = int(prompt.max())
    prompts = np.repeat(rng.integers(0, VOCABULARY, (groups, width), dtype=np.int32), GROUP, axis=0)
    prompt_ids = _lists(prompts[np.arange(width) < prompt[:, None]], prompt)
    response = rng.integers(16, 49, rows)
    tokens = int(response.sum())
    place = np.arange(tokens) - np.repeat(np.cumsum(response) - response, response)
    names = pa.array(np.char.add("g", np.char.zfill(group.astype(str), 9)).tolist())
    made: dict[str, pa.Array] = {
        "episode_id": pa.array([f"{g}-{i}" for g, i in zip(names.to_pylist(), index, strict=True)]),
        "group_id": names,
        "task_id": names,
        "sample_index": pa.array(index),
        "prompt_ids": prompt_ids,
        "response_ids": _lists(rng.integers(0, VOCABULARY, tokens, dtype=np.int32), response),
        "loss_mask": _lists(rng.random(tokens) < 0.9, response),
        "turn_ids": _lists((place // 16).astype(np.int16), response),
        "behaviour_logprobs": _lists(-rng.exponential(1.0, tokens).astype(np.float32), response),
        "behaviour_version": pa.array([f"agent/{v}" for v in rng.integers(1, 9, rows)]),
        "reward": pa.array(rng.integers(0, 2, rows).astype(np.float64)),
        "response_text": _texts(rng, 4 * response),
        "created_at": pa.array([f"2026-01-{1 + g % 28:02d}T00:00:00+00:00" for g in group]),
    }
    constant = {
        "env": "calculator",
        "split": "train",
        "logprob_source": "engine",
        "finish_reason": "done",
        "tokenizer_digest": TOKENIZER,
        "temperature": 1.0,
        "top_p": 1.0,
    }

    def column(field: pa.Field) -> pa.Array:
        empty = "" if pa.types.is_string(field.type) else 0
        return pa.repeat(pa.scalar(constant.get(field.name, empty), field.type), rows)

    columns = [made[f.name].cast(f.type) if f.name in made else column(f) for f in arrow_schema()]
    return pa.Table.from_arrays(columns, schema=arrow_schema())


def _lists(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _texts(rng: np.random.Generator, lengths: np.ndarray) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    letters = rng.integers(97, 123, int(offsets[-1]), dtype=np.uint8)
    return pa.StringArray.from_buffers(len(lengths), pa.py_buffer(offsets), pa.py_buffer(letters))


def generate(folder: Path, rows: int, report: Callable[[int, int], None]) -> None:
    """Shards under `folder`/shards of the product's default size, and their digests in `folder`/shards.json."""
    rng = np.random.default_rng(0)
    groups, per_shard = rows // GROUP, ReplaySettings().shard_rows // GROUP
    (folder / "shards").mkdir()
    shards = []
    for number, first in enumerate(range(0, groups, per_shard)):
        table = make_table(first, min(per_shard, groups - first), rng)
        path = folder / "shards" / f"v00001-{number:05d}.parquet"
        write_file_atomic(path, partial(_write_parquet, table))
        shards.append({"path": str(path.relative_to(folder)), "sha256": sha256_file(path)})
        report(number + 1, math.ceil(groups / per_shard))
    (folder / "shards.json").write_text(json.dumps(shards))


def resident() -> dict[str, float]:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Rss")}
    return {"anonymous": sizes["RssAnon"], "mapped": sizes["RssFile"]}


@contextmanager
def measured(into: dict[str, Any]) -> Iterator[None]:
    """Wall and CPU seconds (of all threads) and the growth of memory of a block, its peak included."""
    before, peak, done = resident(), resident(), threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak.update({name: max(peak[name], size) for name, size in resident().items()})

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    into |= {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    done.set()
    watcher.join()
    after = resident()
    for name in before:
        into[f"{name}_mib"] = after[name] - before[name]
        into[f"{name}_peak_mib"] = max(peak[name], after[name]) - before[name]


def read_for(seconds: float, read: Callable[[int], tuple[int, int]]) -> dict[str, Any]:
    """Call `read` with 0, 1, 2 ...; it returns how many episodes and tokens it read."""
    figures: dict[str, Any] = {}
    episodes = tokens = steps = 0
    with measured(figures):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            found = read(steps)
            episodes, tokens, steps = episodes + found[0], tokens + found[1], steps + 1
    figures |= {"steps": steps, "episodes": episodes, "tokens": tokens}
    for unit in ("episodes", "tokens"):
        figures[f"{unit}_per_second"] = figures[unit] / figures["wall"]
        figures[f"{unit}_per_cpu_second"] = figures[unit] / figures["cpu"]
    return figures


def open_replay(folder: Path) -> Any:
    from tasks.training.shards import Policy, ShardRef, read_replay

    shards = [ShardRef(**shard) for shard in json.loads((folder / "shards.json").read_text())]
    policy = Policy(TOKENIZER, VOCABULARY, 8192)
    return read_replay(shards, folder, policy, frozenset({"behaviour_logprobs"}), cache=folder / "cache")


def decode(folder: Path, seconds: float) -> dict[str, Any]:
    import tasks.training.shards  # noqa: F401  before the clock runs

    figures: dict[str, Any] = {}
    with measured(figures):
        open_replay(folder)
    return figures


def forebay(folder: Path, seconds: float) -> dict[str, Any]:
    import tasks.training.shards  # noqa: F401
    from tasks.training.sampler import Sampler
    from tasks.training.settings import Sampling

    opened: dict[str, Any] = {}
    with measured(opened):
        replay = open_replay(folder)
    sampler = Sampler(replay.table, Sampling(), seed=0)
    _, frontier = sampler.draw(sampler.start(), GROUPS_PER_STEP)  # works the order of the epoch out
    drawn: list[list[str]] = []

    def read(step: int) -> tuple[int, int]:
        nonlocal frontier
        groups, frontier = sampler.draw(frontier, GROUPS_PER_STEP)
        episodes = replay.episodes(groups)
        drawn.append(groups)
        return len(episodes.samples), sum(len(s.prompt_ids) + len(s.response_ids) for s in episodes.samples)

    figures = read_for(seconds, read)
    (folder / "drawn.json").write_text(json.dumps(drawn))
    return figures | {"open": opened, "groups": len(replay.table)}


def peer(how: str, folder: Path, seconds: float) -> dict[str, Any]:
    """`datasets`, as lists, numpy arrays or Arrow tables, by row numbers or by slices."""
    from datasets import load_dataset, utils

    utils.disable_progress_bars()
    kind, access = how.split("-")
    opened: dict[str, Any] = {}
    with measured(opened):
        files = sorted(map(str, (folder / "shards").glob("*.parquet")))
        dataset = load_dataset(
            "parquet", data_files=files, columns=COLUMNS, cache_dir=str(folder / "datasets"), split="train"
        )
        if kind != "lists":
            dataset = dataset.with_format(kind)
    drawn = json.loads((folder / "drawn.json").read_text())
    steps = [[int(name[1:]) * GROUP for name in groups] for groups in drawn]

    def read(step: int) -> tuple[int, int]:
        starts = steps[step % len(steps)]
        if access == "rows":
            parts = [dataset[[row for start in starts for row in range(start, start + GROUP)]]]
        else:
            parts = [dataset[start : start + GROUP] for start in starts]
        first = parts[0]["group_id"][0]
        assert (first.as_py() if kind == "arrow" else first) == drawn[step % len(steps)][0]
        if kind == "arrow":
            table = pa.concat_tables(parts).combine_chunks()
            arrays = {name: _arrays(table[name].chunk(0)) for name in LISTS}
            return len(table), sum(len(ids) for name in TOKENS for ids in arrays[name])
        lists = [part[name] for part in parts for name in TOKENS]
        return sum(len(part["reward"]) for part in parts), sum(len(ids) for ragged in lists for ids in ragged)

    return read_for(seconds, read) | {"open": opened}


def _arrays(lists: pa.ListArray) -> list[np.ndarray]:
    values = lists.values.to_numpy(zero_copy_only=False)
    return [values[start:stop] for start, stop in pairwise(lists.offsets.to_numpy().tolist())]


def trainer(folder: Path, seconds: float) -> dict[str, Any]:
    """Stored tokens a second of one update up to the optimizer, after a smaller one to warm up."""
    import torch

    from benchmarks.training_step import build
    from tasks.training.parallel import World, split
    from tasks.training.settings import TrainingSettings
    from tasks.training.update import accumulate_gradients

    figures: dict[str, Any] = {}
    replay, world = open_replay(folder), World(torch.device("cpu"))
    scorer = split(build("smollm2-135m", "cpu"), world)
    for groups in (1, GROUPS_PER_STEP):
        episodes = replay.episodes(replay.table.ids[:groups].tolist())
        with measured(figures):
            accumulate_gradients(scorer, episodes, TrainingSettings(objective="vespo"), None, world)
    tokens = sum(len(s.prompt_ids) + len(s.response_ids) for s in episodes.samples)
    figures |= {"tokens": tokens, "threads": torch.get_num_threads()}
    return figures | {
        "tokens_per_second": tokens / figures["wall"],
        "tokens_per_cpu_second": tokens / figures["cpu"],
    }


CONTESTANTS: dict[str, Callable[[Path, float], dict[str, Any]]] = {
    "decode": decode,
    "forebay": forebay,
    **{f"datasets-{how}": partial(peer, how) for how in PEERS},
    "trainer": trainer,
}


def run_child(name: str, folder: Path, seconds: float) -> dict[str, Any]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1"}
    command = [
        sys.executable,
        "-m",
        "benchmarks.replay_throughput",
        "--child",
        name,
        str(folder),
        str(seconds),
    ]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def compare(rows: int, seconds: float) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory(prefix="forebay-replay-") as name,
        Progress(console=Console(stderr=True)) as bar,
    ):
        folder = Path(name)
        task = bar.add_task("generate")
        generate(folder, rows, lambda done, total: bar.update(task, completed=done, total=total))
        report: dict[str, Any] = {"rows": rows, "seconds": seconds, "results": {}}
        for contestant in bar.track(CONTESTANTS, description="measure"):
            report["results"][contestant] = run_child(contestant, folder, seconds)
        report["disk_mb"] = {part: size_of(folder / part) / 1e6 for part in ("shards", "cache", "datasets")}
    results = report["results"]
    best = max((f"datasets-{how}" for how in PEERS), key=lambda peer: results[peer]["episodes_per_second"])
    for clock in ("second", "cpu_second"):
        ours = results["forebay"]
        report[f"over_trainer_per_{clock}"] = (
            ours[f"tokens_per_{clock}"] / results["trainer"][f"tokens_per_{clock}"]
        )
        report[f"over_datasets_per_{clock}"] = (
            ours[f"episodes_per_{clock}"] / results[best][f"episodes_per_{clock}"]
        )
    return report | {"best_peer": best}


def show(report: dict[str, Any]) -> None:
    print(f"{describe()}, {report['rows']:,} rows")
    print("disk: " + ", ".join(f"{part} {size:,.0f} MB" for part, size in report["disk_mb"].items()))
    print(f"{'open':22}{'wall s':>9}{'CPU s':>9}{'anonymous peak':>16}{'kept':>8}{'mapped':>8}  MiB")
    results = report["results"]
    opened = {name: r if name == "decode" else r["open"] for name, r in results.items() if name != "trainer"}
    for name, r in opened.items():
        print(
            f"{name:22}{r['wall']:9.2f}{r['cpu']:9.2f}{r['anonymous_peak_mib']:16.0f}{r['anonymous_mib']:8.0f}"
            f"{r['mapped_mib']:8.0f}"
        )
    print(
        f"{'read':22}{'episodes/s':>12}{'tokens/s':>12}{'tokens/CPU s':>14}{'anonymous':>11}{'mapped':>8}  MiB grown"
    )
    for name, r in results.items():
        if name == "decode":
            continue
        episodes = f"{r['episodes_per_second']:,.0f}" if "episodes" in r else ""
        print(
            f"{name:22}{episodes:>12}{r['tokens_per_second']:12,.0f}{r['tokens_per_cpu_second']:14,.0f}"
            f"{r['anonymous_mib']:11.0f}{r['mapped_mib']:8.0f}"
        )
    print(
        f"forebay over trainer: {report['over_trainer_per_second']:.0f}x by wall, "
        f"{report['over_trainer_per_cpu_second']:.0f}x by CPU (wanted: 20x); over {report['best_peer']}: "
        f"{report['over_datasets_per_second']:.1f}x by wall, {report['over_datasets_per_cpu_second']:.1f}x by CPU"
    )


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        _, _, name, folder, seconds = sys.argv
        print(json.dumps(CONTESTANTS[name](Path(folder), float(seconds))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="of reading, a contestant")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--save", action="store_true", help=f"write {BASELINE.relative_to(HERE.parent)}")
    words = parser.parse_args()
    report = {"machine": describe(), **compare(words.rows, words.seconds)}
    show(report)
    for path in [words.json] * bool(words.json) + [BASELINE] * words.save:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
