"""The MLflow adapter on a real store: plain libraries load its agents, no doubles, live metrics, traces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest

from tasks.core.digest import digest_files, digest_tree
from tasks.core.errors import NotFound, Unavailable
from tasks.promotion.promote import champion, crown, promote, reconcile, rollback
from tasks.promotion.registry import DatasetRef, Registered, Registry
from tests.promotion.conftest import open_registry
from tests.promotion.support import (
    TRUST,
    add_decision,
    envelope,
    files_digest,
    mlflow_server,
    open_ledger,
    record_agent,
)

DATA = DatasetRef("main/v1", "a" * 64, "data/replay/main", "0123abc", "d41d8.dir")
REPOSITORY = Path(__file__).parents[2]


def digest_of(folder: Path) -> str:
    return digest_files(digest_tree(folder))


def another(tiny: Path, tmp_path: Path) -> Path:
    """The same model with a note beside it: another digest."""
    folder = Path(shutil.copytree(tiny, tmp_path / "another"))
    (folder / "NOTICE.txt").write_text("another")
    return folder


def trained(registry: Registry, folder: Path, digest: str | None = None) -> Registered:
    with registry.run("training", "key-1", name="run", params={"steps": 3}, dataset=DATA) as sink:
        sink.log({"reward": 0.5}, 0)
    return registry.register(
        folder,
        digest or digest_of(folder),
        run_id=sink.run_id,
        params={"steps": 3},
        metrics={"reward": 0.5},
        tags={"forebay.origin": "trained"},
        dataset=DATA,
    )


def test_an_agent_has_all_that_lineage_asks_for(registry, tiny):
    agent = trained(registry, tiny)
    assert agent.version == 1
    client = registry._client
    version = client.get_model_version("agent", "1")
    assert version.run_id == agent.run_id
    assert version.tags["forebay.origin"] == "trained"
    model = client.get_logged_model(agent.model_id)
    assert str(model.status) == "READY"
    assert model.params == {"steps": "3"}
    (metric,) = model.metrics
    assert (metric.key, metric.value, metric.dataset_name) == ("reward", 0.5, "main/v1")
    run = client.get_run(agent.run_id)
    assert run.info.status == "FINISHED"
    (data,) = run.inputs.dataset_inputs
    assert data.dataset.source_type == "dvc"
    assert json.loads(data.dataset.source) == {
        "path": DATA.path,
        "rev": DATA.rev,
        "md5": DATA.md5,
        "root": DATA.root,
    }
    assert [output.model_id for output in run.outputs.model_outputs] == [agent.model_id]


def test_mlflow_finds_the_dataset_source_again(registry, tiny):
    import mlflow

    trained(registry, tiny)
    (data,) = registry._client.get_run(registry.find(digest_of(tiny)).run_id).inputs.dataset_inputs
    source = mlflow.data.get_source(data)
    assert (source.load(), source.root) == (DATA.path, DATA.root)


LOADS = """
import sys, mlflow, mlflow.transformers, mlflow.pyfunc
from transformers import AutoModelForCausalLM, AutoTokenizer
mlflow.set_tracking_uri(sys.argv[1])
pipeline = mlflow.transformers.load_model("models:/agent@champion")
said = pipeline("1+1=", max_new_tokens=4, do_sample=False)[0]["generated_text"]
(again,) = mlflow.pyfunc.load_model("models:/agent@champion").predict(["1+1="], params=None)
folder = mlflow.artifacts.download_artifacts("models:/agent@champion") + "/model"
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
ids = model.generate(**tokenizer("1+1=", return_tensors="pt"), max_new_tokens=4, do_sample=False)
assert said.startswith("1+1=") and again.startswith("1+1=")
assert tokenizer.decode(ids[0], skip_special_tokens=True) == said, (tokenizer.decode(ids[0]), said)
print("loaded")
"""


def run_python(code: str, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=cwd, env=env
    )


@pytest.mark.slow
def test_a_clean_process_loads_it_with_plain_mlflow_and_plain_transformers(registry, tiny, tmp_path):
    agent = trained(registry, tiny)
    registry.set_alias("champion", agent.version)
    done = run_python(LOADS, registry.uri, cwd=tmp_path)
    assert "loaded" in done.stdout, done.stderr


def test_weights_are_linked_and_not_copied(registry, tiny):
    trained(registry, tiny)
    linked = list((registry._artifacts / "agents").rglob("model/model.safetensors"))
    assert [path.stat().st_ino for path in linked] == [(tiny / "model.safetensors").stat().st_ino]
    assert digest_of(linked[0].parent) == digest_of(tiny)


def test_the_same_digest_is_the_same_version_and_another_is_the_next(registry, tiny, tmp_path):
    first = trained(registry, tiny)
    assert trained(registry, tiny) == first
    other = another(tiny, tmp_path)
    assert registry.register(other, digest_of(other)).version == 2
    assert registry.register(other, digest_of(other)) == Registered(
        2, registry.find(digest_of(other)).model_id, None
    )
    assert registry.digest(1) == digest_of(tiny)
    assert registry.digest(7) is None
    assert registry.find("0" * 64) is None


@pytest.mark.parametrize(
    "step",
    ["log_outputs", "log_batch", "finalize_logged_model", "create_registered_model", "create_model_version"],
)
@pytest.mark.parametrize("done", [False, True])
def test_a_crash_at_any_step_of_registering_makes_no_double(registry, tiny, monkeypatch, step, done):
    with registry.run("training", "key-1", name="run") as sink:
        pass
    client = registry._client
    original = getattr(client, step)

    def crash(*args, **kwargs):
        if done:
            original(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(client, step, crash)
    with pytest.raises(KeyboardInterrupt):
        registry.register(tiny, digest_of(tiny), run_id=sink.run_id, metrics={"reward": 1.0}, dataset=DATA)
    monkeypatch.undo()
    agent = registry.register(
        tiny, digest_of(tiny), run_id=sink.run_id, metrics={"reward": 1.0}, dataset=DATA
    )
    assert agent.version == 1
    experiment = client.get_experiment_by_name("agents").experiment_id
    assert [m.model_id for m in client.search_logged_models([experiment])] == [agent.model_id]
    assert str(client.get_logged_model(agent.model_id).status) == "READY"
    assert len(client.search_model_versions("name = 'agent'")) == 1
    assert len(client.get_run(sink.run_id).outputs.model_outputs) == 1


def stranger(registry: Registry, files: Path, digest: str, run_id: str | None = None) -> Registered:
    """What anybody can make in MLflow: a finished logged model and a version, with the tags of another digest."""
    model = registry._client.create_logged_model(
        registry._experiment("agents"), name="agent", source_run_id=run_id, tags={"forebay.digest": digest}
    )
    registry._fill(model, files)
    registry._client.finalize_logged_model(model.model_id, "READY")
    registry._client.create_registered_model("agent")
    tags = {"forebay.digest": digest, "forebay.model": model.model_id}
    made = registry._client.create_model_version("agent", model.artifact_location, run_id=run_id, tags=tags)
    return Registered(int(made.version), model.model_id, run_id)


def test_a_version_that_only_carries_the_digest_is_never_adopted(registry, tiny, tmp_path):
    evil = stranger(registry, another(tiny, tmp_path), digest_of(tiny))
    mine = registry.register(tiny, digest_of(tiny))
    assert mine.version == 2
    assert mine.model_id != evil.model_id
    assert (registry.served(1), registry.served(2)) == (digest_of(tmp_path / "another"), digest_of(tiny))
    assert registry.register(tiny, digest_of(tiny)) == mine  # and what is ours is taken up again


def test_nor_one_of_another_run_or_of_a_folder_that_has_the_id_in_its_name(registry, tiny, tmp_path):
    with registry.run("training", "key-1", name="run") as sink:
        pass
    other = stranger(registry, tiny, digest_of(tiny))
    mine = registry.register(tiny, digest_of(tiny), run_id=sink.run_id)
    assert mine.model_id != other.model_id
    place = registry._client.get_logged_model(mine.model_id).artifact_location
    registry._client.delete_model_version("agent", str(mine.version))
    folder = tmp_path / "evil" / mine.model_id / "artifacts"
    shutil.copytree(tiny, folder / "model")
    for source in (folder.as_uri(), str(folder), f"{place}/model", f"file://{tmp_path}/{mine.model_id}"):
        tags = {"forebay.digest": digest_of(tiny), "forebay.model": mine.model_id}
        registry._client.create_model_version("agent", source, run_id=sink.run_id, tags=tags)
    assert {held.model for version, held in registry.versions().items() if version > mine.version} == {""}
    again = registry.register(tiny, digest_of(tiny), run_id=sink.run_id)
    assert again == Registered(mine.version + 5, mine.model_id, sink.run_id)
    assert registry.versions()[again.version].model == mine.model_id


def test_what_is_taken_up_again_has_only_what_forebay_laid_out(registry, tiny):
    """A stranger's MLmodel may name code that MLflow runs when it loads the model."""
    evil = stranger(registry, tiny, digest_of(tiny))
    place = Path(
        url2pathname(urlsplit(registry._client.get_logged_model(evil.model_id).artifact_location).path)
    )
    (place / "MLmodel").write_text("flavors: {python_function: {loader_module: evil}}")
    assert registry.register(tiny, digest_of(tiny)) == evil
    assert "evil" not in (place / "MLmodel").read_text()
    (place / "model" / "extra.py").write_text("")
    assert registry.register(tiny, digest_of(tiny)).version == evil.version + 1


def test_a_run_is_taken_up_again_by_its_key(registry):
    sink = registry.run("training", "key-1", name="run", dataset=DATA)
    sink.log({"loss": 1.0}, 0)
    sink.close("FAILED")
    again = registry.run("training", "key-1", name="run", dataset=DATA)
    assert again.run_id == sink.run_id
    again.log({"loss": 0.5}, 1)
    again.close()
    history = registry._client.get_metric_history(sink.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(0, 1.0), (1, 0.5)]
    run = registry._client.get_run(sink.run_id)
    assert run.info.status == "FINISHED"
    assert len(run.inputs.dataset_inputs) == 1


def test_metrics_go_out_in_batches_and_an_exception_fails_the_run(registry, tmp_path):
    (tmp_path / "note.txt").write_text("kept")
    start = time.monotonic()
    sink = registry.run("training", "key-2", name="run")

    def work():
        with sink:
            for step in range(300):
                sink.log({"loss": 1 / (step + 1), "kl": float(step)}, step)
            sink.artifact(tmp_path / "note.txt", "notes")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert time.monotonic() - start < 25  # one by one this takes a minute
    client = registry._client
    assert len(client.get_metric_history(sink.run_id, "kl")) == 300
    assert client.get_run(sink.run_id).info.status == "FAILED"
    assert [a.path for a in client.list_artifacts(sink.run_id, "notes")] == ["notes/note.txt"]


def test_promotion_rollback_and_repair_on_the_real_registry(registry, tiny, tmp_path):
    ledger = open_ledger(tmp_path)
    for version in (1, 2):
        assert registry.register(tiny, files_digest(version)).version == version
        record_agent(ledger, version, files_digest(version))
    assert registry.aliases() == {}
    crown(ledger, registry, 1, by="kim")
    assert registry.aliases() == {"champion": 1, "candidate": 2}
    decision = add_decision(ledger, 2, 1)
    signed = {"decision": decision, "signature": envelope(ledger, decision), "trust": TRUST}
    promote(ledger, registry, 2, **signed, expected_champion=1, by="kim")
    assert registry.aliases() == {"champion": 2, "previous": 1}
    registry.delete_alias("champion")
    assert [r.wrote for r in reconcile(ledger, registry).repairs] == [2]
    registry._client.delete_model_version("agent", "2")  # MLflow lets anybody delete the champion
    with pytest.raises(NotFound, match="gone from the registry"):
        reconcile(ledger, registry)
    rollback(ledger, registry, expected_champion=2, reason="deleted", by="kim")
    assert registry.aliases()["champion"] == champion(ledger) == 1


PREPARE = """
import sys, pathlib
from tasks.promotion.registry import Registry
root = pathlib.Path(sys.argv[1])
registry = Registry(f"sqlite:///{root / 'mlflow.db'}", root / "artifacts", root / "locks")
registry.prepare()
with registry.run("training", sys.argv[2], name="run") as sink:
    sink.log({"loss": 1.0}, 0)
print("ready")
"""


@pytest.mark.slow
def test_four_processes_prepare_one_fresh_store(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", PREPARE, str(tmp_path)]
    pipe = subprocess.PIPE
    workers = [
        subprocess.Popen([*command, f"k{i}"], env=env, stdout=pipe, stderr=pipe, text=True) for i in range(4)
    ]
    for worker in workers:
        out, err = worker.communicate()
        assert "ready" in out, err
    client = open_registry(tmp_path)._client
    assert len(client.search_runs([client.get_experiment_by_name("training").experiment_id])) == 4


def test_traces_come_as_plain_values_with_their_feedback(registry):
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(registry.uri)
    try:
        experiment = registry._experiment("served")
        for question in ("1+1", "2+2"):
            root = mlflow.start_span_no_context(
                "agent", inputs={"question": question}, experiment_id=experiment
            )
            root.set_outputs({"answer": "2"})
            root.end()
            mlflow.flush_trace_async_logging()
            mlflow.log_feedback(trace_id=root.trace_id, name="right", value=question == "1+1")
    finally:
        mlflow.set_tracking_uri(before)
    found = list(registry.traces("served"))
    given = [t["info"]["assessments"] for t in found]
    assert [(a[0]["assessment_name"], a[0]["feedback"]["value"]) for a in given] == [
        ("right", True),
        ("right", False),
    ]
    assert [t["data"]["spans"][0]["name"] for t in found] == ["agent", "agent"]
    json.dumps(found)
    with pytest.raises(NotFound, match="no experiment 'none'"):
        list(registry.traces("none"))


def test_nobody_there_is_said_at_once(tmp_path):
    registry = Registry("http://127.0.0.1:9", tmp_path / "artifacts", tmp_path / "locks")
    with pytest.raises(Unavailable, match=r"No MLflow server answers at http://127\.0\.0\.1:9"):
        registry.aliases()


@pytest.mark.server
def test_the_same_through_a_server_that_keeps_the_files(migrated, tiny, tmp_path):
    shutil.copy(migrated, tmp_path / "mlflow.db")
    with mlflow_server(tmp_path) as uri:
        registry = Registry(uri, tmp_path / "artifacts", tmp_path / "locks")
        registry.prepare()
        agent = trained(registry, tiny)
        assert trained(registry, tiny) == agent
        registry.set_alias("champion", agent.version)
        assert registry.aliases() == {"champion": 1}
        (kept,) = (tmp_path / "kept").rglob("model/model.safetensors")
        assert digest_of(kept.parent) == digest_of(tiny)
        assert not (tmp_path / "artifacts").exists()
        with registry.open_file(1, "model.safetensors") as served:
            assert served.read() == kept.read_bytes()
        with pytest.raises(FileNotFoundError):
            registry.open_file(1, "nothing.bin")
        with pytest.raises(FileNotFoundError):
            registry.open_file(7, "model.safetensors")
        done = run_python(LOADS, uri, cwd=tmp_path)
        assert "loaded" in done.stdout, done.stderr
    with pytest.raises(Unavailable):
        registry.open_file(1, "model.safetensors")


def test_a_decision_is_shown_at_the_run_and_at_the_version_and_again(registry, tiny, tmp_path):
    agent, page = trained(registry, tiny), tmp_path / "page.html"
    assert registry.decision_route(digest_of(tiny), "d1") is None
    for text in ("<p>first", "<p>second"):
        page.write_text(text)
        route = registry.show_decision(
            digest_of(tiny), page, decision="d1", verdict="PASS", says="It is better."
        )
    experiment = registry._client.get_run(agent.run_id).info.experiment_id
    assert route == f"#/experiments/{experiment}/runs/{agent.run_id}/artifacts/decision/d1.html"
    assert registry.decision_route(digest_of(tiny), "d1") == route
    kept = registry._client.download_artifacts(agent.run_id, "decision/d1.html", str(tmp_path / "down"))
    assert Path(kept).read_text() == "<p>second"
    version = registry._client.get_model_version("agent", "1")
    assert version.tags["forebay.verdict"] == "PASS"
    assert version.description == f"Gate: **PASS**. It is better. [The decision]({route})"


def test_what_somebody_wrote_at_a_version_stays(registry, tiny, tmp_path):
    trained(registry, tiny)
    page = tmp_path / "page.html"
    page.write_text("<p>")
    registry._client.update_model_version("agent", "1", "Ours since Tuesday.")
    registry.show_decision(digest_of(tiny), page, decision="d1", verdict="FAIL", says="")
    assert registry._client.get_model_version("agent", "1").description == "Ours since Tuesday."


def test_a_base_model_has_no_run_to_keep_a_page_with(registry, tiny, tmp_path):
    registry.register(tiny, digest_of(tiny))
    page = tmp_path / "page.html"
    page.write_text("<p>")
    assert registry.show_decision(digest_of(tiny), page, decision="d1", verdict="FAIL", says="") is None
    assert registry._client.get_model_version("agent", "1").tags["forebay.decision"] == "d1"
    assert registry.show_decision("f" * 64, page, decision="d1", verdict="FAIL", says="") is None
