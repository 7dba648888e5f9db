"""Objectives by name and by import path; what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest

from models import objectives
from tests.models.objectives.flat import WORKED, batch_of, loss_and_gradient, random_batch

MINE = "tests.models.objectives.user_functions"
NAMES = [
    "bapo",
    "cispo",
    "cispo_trl",
    "dapo",
    "decoupled_ppo",
    "dppo",
    "dr_grpo",
    "grpo",
    "gspo",
    "gspo_token",
    "icepop",
    "m2po",
    "m2po_areal",
    "mis",
    "ppo",
    "reinforce",
    "sampo",
    "sapo",
    "sequence_mis",
    "sequence_tis",
    "tis",
    "topr",
    "vespo",
    "vespo_trl",
]


def test_names():
    assert list(objectives.names()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_missing_fields_are_named(name):
    objective = objectives.get(name)
    batch = random_batch(0)
    objective.loss(batch)
    assert bool(objective.needs) == (name != "reinforce")
    for need in objective.needs:
        with pytest.raises(ValueError, match=f"objective {name} needs {need}; the batch has none"):
            objective.loss(replace(batch, **{need: None}))
    bare = replace(batch, **dict.fromkeys(objective.needs))
    if objective.needs:
        with pytest.raises(ValueError, match=" and ".join(sorted(objective.needs))):
            objective.loss(bare)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_declared_is_not_read(name):
    """A batch with nothing but the declared fields gives a loss, so that `needs` is complete."""
    objective = objectives.get(name)
    batch = random_batch(0)
    optional = (
        "behaviour_logprobs",
        "old_logprobs",
        "reference_logprobs",
        "entropies",
        "turn",
        "group",
        "diversity",
    )
    least = replace(batch, **{field: None for field in optional if field not in objective.needs})
    assert objective.loss(least).tokens.isfinite().all()


@pytest.mark.parametrize(
    ("name", "option", "hint"),
    [
        ("vespo", "c1_positive", "c1_pos"),
        ("grpo", "eps_low", "eps_lo"),
        ("topr", "length_normalized", "length_normalised"),
        ("reinforce", "eps", "it has none"),
        (f"{MINE}:plain", "slop", "slope"),
    ],
)
def test_unknown_options_name_the_nearest(name, option, hint):
    objective = objectives.get(name)
    with pytest.raises(ValueError, match=f"no option {option}.*{hint}"):
        objective.loss(random_batch(0), **{option: 1.0})
    with pytest.raises(ValueError, match=f"no option {option}.*{hint}"):
        objective.check([option])


def test_known_options_pass_the_check():
    objectives.get("vespo").check(["c1_pos", "c2_neg"])
    objectives.get("vespo").check({})
    objectives.get(f"{MINE}:anything").check(["gradient"])


def test_unknown_names_are_told_the_nearest():
    for name, hint in (("vesppo", "vespo"), ("gsspo_token", "gspo_token"), ("grp", "grpo")):
        with pytest.raises(ValueError, match=f"there is no objective {name}; did you mean {hint}"):
            objectives.get(name)


def test_a_name_is_given_once_and_fields_exist():
    with pytest.raises(ValueError, match="registered already"):
        objectives.register("vespo")(objectives.reinforce)
    with pytest.raises(
        ValueError, match="no optional field behavior_logprobs; did you mean behaviour_logprobs"
    ):
        objectives.register("mine", needs=("behavior_logprobs",))
    with pytest.raises(ValueError, match="no optional field logprobs"):
        objectives.requires("logprobs")
    assert list(objectives.names()) == NAMES


def test_a_function_by_its_import_path():
    plain = objectives.get(f"{MINE}:plain")
    assert (plain.needs, plain.correction, plain.coupled) == (frozenset(), "outside", False)
    batch = batch_of(*WORKED)
    assert loss_and_gradient(f"{MINE}:plain", batch, "token-mean") == loss_and_gradient(
        "reinforce", batch, "token-mean"
    )
    steep = loss_and_gradient(f"{MINE}:plain", batch, "token-mean", slope=3.0)[1]
    assert steep == pytest.approx([3 * x for x in loss_and_gradient("reinforce", batch, "token-mean")[1]])
    assert loss_and_gradient(f"{MINE}:anything", batch, "token-mean", gradient=3.0)[1] == steep


def test_a_users_function_declares_its_needs():
    demanding = objectives.get(f"{MINE}:demanding")
    assert demanding.needs == {"reference_logprobs", "entropies"}
    assert (demanding.correction, demanding.coupled) == ("own", True)
    with pytest.raises(ValueError, match="demanding needs entropies and reference_logprobs"):
        demanding.loss(batch_of(*WORKED))
    assert objectives.get(f"{MINE}:attributed").needs == {"turn"}
    with pytest.raises(ValueError, match="attributed needs turn"):
        objectives.get(f"{MINE}:attributed").loss(batch_of(*WORKED))
    registered = objectives.get("models.objectives.weighted:vespo")
    assert (registered.needs, registered.correction) == ({"behaviour_logprobs"}, "inside")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"{MINE}:absent", "cannot be imported.*absent"),
        ("no.such.module:loss", "cannot be imported: No module named 'no'"),
        (f"{MINE}:NUMBER", "is of type int, not a function"),
    ],
)
def test_bad_import_paths_are_refused(path, message):
    with pytest.raises(ValueError, match=message):
        objectives.get(path)
