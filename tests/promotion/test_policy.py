"""The policy file: documented defaults, unknown keys refused, a digest of the content."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.core.errors import UsageError
from tasks.promotion.policy import Policy, load_policy

DEFAULT = Path(__file__).parents[2] / "policy.yaml"


def test_the_file_in_the_repository_spells_out_the_defaults():
    assert load_policy(DEFAULT) == Policy()


def test_twenty_nights_of_retraining_stay_within_five_percent():
    errors = Policy().errors
    assert errors.cycles * errors.share == pytest.approx(errors.alpha)
    assert errors.cycles >= 20
    assert errors.alpha <= 0.05


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("superiority: {margn: 0.1}", "unknown key `superiority.margn`; did you mean `margin`"),
        ("guard: {}", "did you mean `guards`"),
        ("errors: {alpha: 0.7}", "errors.alpha"),
        ("errors: {cycle: 30}", "did you mean `cycles`"),
        ("version: 2", "version"),
        ("approval: maybe", "approval"),
        ("[1, 2]", "must be a mapping"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, text, says):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=says) as caught:
        load_policy(path)
    assert "\n" not in str(caught.value)


def test_comments_do_not_change_the_digest_and_rules_do(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("# nothing but defaults\n")
    assert load_policy(path).digest() == load_policy(DEFAULT).digest()
    assert Policy.model_validate({"superiority": {"margin": 0.02}}).digest() != Policy().digest()
