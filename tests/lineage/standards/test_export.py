"""`forebay export` as a user runs it: files, the collector, the check of what was written, bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from flows.cli import main
from tasks.core.dsse import sign
from tasks.lineage.standards.check import check
from tests.lineage.page.world import revoke
from tests.lineage.standards.collectors import Collector
from tests.lineage.standards.official import cyclonedx_fault, open_statement, prov_faults
from tests.promotion.support import EVE, SERVICE, TRUST

ALL = {"README.md", "bom.cdx.json", "export.dsse.json", "openlineage.ndjson", "prov.json"}


@pytest.fixture
def forebay(world, monkeypatch, capsys):
    """Run a command on the world; return its exit code and what it printed."""
    (world.workspace.root / "params.yaml").write_text("{}\n")
    give_key(world, SERVICE)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["forebay", *words, "--workspace", str(world.workspace.root)])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        return left.value.code or 0, said.out, said.err

    return run


def give_key(world, key):
    world.workspace.keys.mkdir(parents=True, exist_ok=True)
    path = world.workspace.keys / f"{key.name}.key"
    path.write_bytes(key._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)


@pytest.fixture
def exported(forebay, tmp_path):
    folder = tmp_path / "out"
    code, _, err = forebay("export", "agent@champion", "--as", "all", "--output", str(folder))
    assert code == 0, err
    return folder


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def misfits(forebay, folder):
    code, out, _ = forebay("export", "--check", str(folder), "--json")
    report = json.loads(out)
    assert code == (0 if report["ok"] else 6)
    return {(m["attestation"], m["subject"]) for m in report["misfits"]}


def test_everything_is_written_and_valid(exported):
    files = contents(exported)
    assert {name for name in files if "/" not in name} == ALL
    attestations = [name for name in files if name.startswith("attestations/")]
    assert len(attestations) == 6
    assert cyclonedx_fault(json.loads(files["bom.cdx.json"])) is None
    assert prov_faults(json.loads(files["prov.json"])) == []
    whole = open_statement(files["export.dsse.json"])
    assert {item["name"] for item in whole["subject"]} == files.keys() - {"export.dsse.json"}


def test_a_second_export_gives_the_same_bytes(forebay, exported, tmp_path):
    code, out, _ = forebay("export", "agent/3", "--as", "all", "-o", str(tmp_path / "again"), "--json")
    assert code == 0
    assert contents(tmp_path / "again") == contents(exported)
    assert set(json.loads(out)["files"]) == set(contents(exported))


def test_an_index_that_is_built_anew_changes_no_byte(world, forebay, exported, tmp_path):
    for path in world.workspace.state.glob("lineage.db*"):
        path.unlink()
    code, _, _ = forebay("export", "--as", "all", "-o", str(tmp_path / "again"))
    assert (code, contents(tmp_path / "again")) == (0, contents(exported))


def test_the_export_of_a_moved_workspace_is_the_same(world, forebay, exported, tmp_path, monkeypatch):
    before = contents(exported)
    moved = tmp_path / "elsewhere"
    world.workspace.root.rename(moved)
    monkeypatch.setattr(
        sys, "argv", ["forebay", "export", "-o", str(tmp_path / "b"), "--workspace", str(moved)]
    )
    with pytest.raises(SystemExit):
        main()
    assert contents(tmp_path / "b") == before


def test_a_check_of_a_true_export_finds_nothing(forebay, exported):
    code, out, _ = forebay("export", "--check", str(exported))
    assert code == 0
    assert "checked: 7 signatures hold, " in out
    assert misfits(forebay, exported) == set()


@pytest.mark.parametrize("name", sorted(ALL - {"export.dsse.json"}))
def test_a_changed_document_is_named(forebay, exported, name):
    path = exported / name
    path.write_bytes(path.read_bytes().replace(b"agent/3", b"agent/9"))
    assert misfits(forebay, exported) == {("export.dsse.json", name)}


def test_a_changed_or_lost_file_of_the_workspace_is_named(world, forebay, exported):
    run = f"attestations/run-{world.agents[3]['parents']['run'][:12]}.dsse.json"
    weights = f"{world.agents[3]['path']}/model.safetensors"
    (world.workspace.root / weights).write_bytes(b"others")
    shard = world.manifests["main"].shards[0].path
    (world.workspace.root / shard).unlink()
    found = misfits(forebay, exported)
    assert found == {(run, weights), ("attestations/dataset-main-v1.dsse.json", shard)}
    _, out, _ = forebay("export", "--check", str(exported))
    assert "does not fit" in out
    assert Path(shard).name in out


def test_a_changed_attestation_and_an_added_file_are_named(forebay, exported):
    path = exported / "attestations/dataset-main-v1.dsse.json"
    path.write_bytes(path.read_bytes().replace(b'"payload":"', b'"payload":"AAAA'))
    (exported / "note.txt").write_text("trust me")
    name = "attestations/dataset-main-v1.dsse.json"
    assert misfits(forebay, exported) == {
        (name, None), ("export.dsse.json", name), ("export.dsse.json", "note.txt"),
    }  # fmt: skip


def test_another_key_does_not_pass(world, forebay, exported, monkeypatch):
    said = open_statement((exported / "export.dsse.json").read_bytes())
    subjects = {item["name"]: item["digest"]["sha256"] for item in said["subject"]}
    (exported / "export.dsse.json").write_bytes(sign("export", subjects, said["predicate"], EVE))
    assert misfits(forebay, exported) == {("export.dsse.json", None)}


def test_a_key_that_was_removed_signed_old_decisions_and_no_new_export(world, exported):
    last = world.ledger.last()
    found = check(
        exported, world.workspace, TRUST.remove("service", last.seq), world.ledger.entries("decision.made")
    )
    assert found.signatures == 2
    assert len(found.misfits) == 5
    assert all("removed" in misfit.says for misfit in found.misfits)
    assert not any("decision" in misfit.attestation for misfit in found.misfits)


def test_a_forged_decision_is_named(world, forebay, exported):
    """One that the service's key signed but the ledger does not have."""
    name = next((exported / "attestations").glob("decision-*")).name
    made = open_statement((exported / "attestations" / name).read_bytes())
    (exported / "attestations" / name).write_bytes(
        sign("gate-decision", {"decision": "0" * 64}, made["predicate"], SERVICE)
    )
    assert (f"attestations/{name}", None) in misfits(forebay, exported)


def test_an_export_into_the_folder_of_another_agent_leaves_nothing_of_it(forebay, exported):
    forebay("export", "agent/2", "--output", str(exported))
    assert misfits(forebay, exported) == set()
    assert len(list((exported / "attestations").iterdir())) == 3


def test_a_lost_attestation_is_named(forebay, exported):
    (exported / "export.dsse.json").unlink()
    assert misfits(forebay, exported) == {("export.dsse.json", None)}
    (exported / "attestations/dataset-main-v1.dsse.json").rename(exported / "attestations/x.txt")
    assert ("export.dsse.json", None) in misfits(forebay, exported)


def test_one_format_needs_no_key(world, forebay, tmp_path):
    (world.workspace.keys / "service.key").unlink()
    code, _, _ = forebay("export", "agent/2", "--as", "card", "--as", "prov", "-o", str(tmp_path / "o"))
    assert code == 0
    assert set(contents(tmp_path / "o")) == {"README.md", "prov.json"}
    code, _, err = forebay("export", "agent/2", "--as", "intoto", "-o", str(tmp_path / "p"))
    assert (code, (tmp_path / "p").exists()) == (5, False)
    assert "No trusted service key" in err


def test_a_dataset_has_what_datasets_have(forebay, tmp_path):
    code, _, _ = forebay("export", "dataset:main/v2", "-o", str(tmp_path / "o"))
    assert code == 0
    names = set(contents(tmp_path / "o"))
    assert {"prov.json", "openlineage.ndjson", "attestations/dataset-main-v2.dsse.json"} <= names
    assert not names & {"README.md", "bom.cdx.json"}
    code, _, err = forebay("export", "dataset:main/v2", "--as", "card", "-o", str(tmp_path / "p"))
    assert code == 2
    assert "made of agents" in err


def test_events_go_to_a_collector_without_a_folder(forebay, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    with Collector() as collector:
        code, out, _ = forebay("export", "--openlineage-url", collector.url)
    assert (code, len(collector.bodies)) == (0, 32)
    assert "the collector took 32 events" in out
    assert set(tmp_path.iterdir()) == before


def test_a_collector_that_fails_is_exit_code_7_and_takes_no_file_away(forebay, tmp_path):
    with Collector(fail_at=2) as collector:
        code, out, err = forebay(
            "export",
            "--as",
            "openlineage",
            "-o",
            str(tmp_path / "o"),
            "--openlineage-url",
            collector.url,
            "--json",
        )
    assert (code, json.loads(out)["kind"]) == (7, "Unavailable")
    assert "refused event 2 of 32: HTTP 500" in err
    assert set(contents(tmp_path / "o")) == {"openlineage.ndjson"}


def test_a_wrong_address_is_said_before_anything_is_written(forebay, tmp_path):
    code, _, err = forebay("export", "-o", str(tmp_path / "o"), "--openlineage-url", "there")
    assert (code, (tmp_path / "o").exists()) == (2, False)
    assert "no address of a collector" in err


def test_a_folder_that_cannot_be_written_sends_nothing(forebay):
    with Collector() as collector:
        code, _, _ = forebay(
            "export", "--as", "card", "-o", "/dev/null/x", "--openlineage-url", collector.url
        )
    assert (code, collector.bodies) == (2, [])


def test_what_was_erased_on_purpose_fits(world, forebay, exported):
    first, second = world.manifests["main"].shards[:2]
    payload = {"what": "group:g1", "revocation": revoke(world, "group:g1", ["g1"]), "intent": 0, "by": "lee"}
    files = [{"path": first.path, "sha256": first.sha256}]
    world.ledger.append("data.erased", "group:g1", {**payload, "reason": "a person asked", "files": files})
    (world.workspace.root / first.path).unlink()
    assert misfits(forebay, exported) == set()
    _, out, _ = forebay("export", "--check", str(exported), "--json")
    says = f"{Path(first.path).name} was erased on purpose (group:g1: a person asked)."
    name = "attestations/dataset-main-v1.dsse.json"
    assert json.loads(out)["erased"] == [{"attestation": name, "subject": first.path, "says": says}]
    _, out, _ = forebay("export", "--check", str(exported))
    assert f"erased on purpose: {first.path}" in out.replace("\n", "").replace(
        "purpose:", "purpose: "
    ).replace("  ", " ")
    (world.workspace.root / second.path).unlink()
    assert misfits(forebay, exported) == {(name, second.path)}


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("export", "agent/33"), 3, "nearest names"),
        (("export", "--as", "spdx"), 2, "spdx"),
        (("export", "--openlineage-url", "there"), 2, "no address of a collector"),
        (("export", "--check", "nowhere"), 3, "no attestations"),
        (("export", "--as", "card", "-o", "/dev/null/x"), 2, "/dev/null/x"),
    ],
)
def test_bad_input_is_a_sentence(forebay, words, code, says):
    left, _, err = forebay(*words)
    assert left == code
    assert says in err
    assert "Traceback" not in err
