"""What earlier decisions took from the two budgets of the gate, counted in the ledger.

Retraining asks the same question again and again. A champion may be replaced by an agent that is no better with a
probability of `errors.alpha` over all decisions against it; each takes its share when it is recorded, whatever it
said (Bonferroni's inequality, so nothing has to be assumed about how the candidates depend on each other). And every
decision on the same held-out tasks tells a little about them, so their uses are counted too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tasks.core.ledger import Entry


@dataclass(frozen=True)
class Spent:
    """What was spent before a decision.

    Attributes:
        decisions: how many there were against this champion.
        error: the sum of their one-sided errors.
        uses: how many used these held-out tasks, in the environment where it is most.
    """

    decisions: int = 0
    error: float = 0.0
    uses: int = 0


def spent(entries: Iterable[Entry], champion: str, tasks: Mapping[str, str]) -> Spent:
    """Add up what the decisions took; one that was recorded again counts once.

    Args:
        entries: those of kind "decision.made", in order.
        champion: digest of the champion's files; a champion that returns by a rollback finds its account as it was.
        tasks: {environment: digest of its held-out tasks}.
    """
    decisions, error = 0, 0.0
    uses = dict.fromkeys(tasks, 0)
    asked = set()
    for entry in entries:
        made = entry.payload
        question = made.get("question", made["decision"])
        if question in asked:
            continue
        asked.add(question)
        if made["champion"]["digest"] == champion:
            decisions += 1
            error += made.get("error", 0.0)
        for env, digest in made.get("tasks", {}).items():
            if tasks.get(env) == digest:
                uses[env] += 1
    return Spent(decisions, error, max(uses.values(), default=0))


def asked_before(entries: Iterable[Entry], question: str) -> Spent | None:
    """Return what had been spent when the same question was first asked, None where it is new.

    A question is all evidence and the policy: asking it again takes nothing and gets the same answer.
    """
    for entry in entries:
        if entry.payload.get("question") == question:
            return Spent(**entry.payload["spent"])
    return None
