"""Is a dataset version fit to be trained on? Row invariants in numpy, a verdict with reasons, a quarantine.

Token-level invariants are checked here; the episode-level checkpoint and its HTML come from `expectations`.
The verdict is a ledger entry; the cycle goes no further than a FAIL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, sha256_bytes
from tasks.core.ledger import Ledger
from tasks.core.locks import file_lock
from tasks.core.workspace import Workspace
from tasks.replay.schema import BROKEN, memory_of
from tasks.replay.seal import SealedDataset
from tasks.replay.shards import read_rows

if TYPE_CHECKING:
    import pyarrow as pa

VALIDATED = "dataset.validated"
_ROUNDING = 1e-5  # a certain token's log-probability may come out this much above 0 in float32
_SOURCES = ("engine", "recomputed", "missing")

Flags = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Check:
    """One named question to a dataset: how many of how many rows (groups, where the detail says so) failed
    it.
    """

    name: str
    ok: bool
    failed: int
    of: int
    detail: str


@dataclass(frozen=True)
class Expected:
    """What the rows are compared with: the policy to be trained, and what it will be judged on.

    Args:
        policy_version: registry version of the policy to be trained.
        max_policy_lag: registry versions that a behaviour may be behind it; older rows are not counted as
            usable.
        min_groups: usable groups that a dataset needs.
        vocabulary: size of the policy's vocabulary, if known.
        evaluation_prompts: `prompt_sha256` of the tasks on which agents are compared.
        group_size: episodes that every group must have, if all must have the same.
    """

    tokenizer_digest: str
    template_digest: str
    policy_version: int
    max_policy_lag: int
    min_groups: int
    vocabulary: int | None = None
    evaluation_prompts: frozenset[str] = field(default_factory=frozenset)
    group_size: int | None = None


@dataclass(frozen=True)
class ValidationReport:
    """The verdict on a dataset version; `evidence` names the file that holds it in full, with its SHA-256."""

    root: str
    verdict: Literal["PASS", "FAIL"]
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]
    evidence: Mapping[str, str]

    def to_payload(self) -> dict[str, Any]:
        """Return the payload of the `dataset.validated` ledger entry."""
        values = asdict(self)
        return {**values, "reasons": list(self.reasons), "checks": [asdict(check) for check in self.checks]}


def validate_dataset(
    workspace: Workspace, ledger: Ledger, sealed: SealedDataset, expected: Expected
) -> ValidationReport:
    """Check every row of a sealed version, keep the evidence, record the verdict; a FAIL quarantines it.

    Raises:
        Corrupt: a shard is missing or its bytes are not what was sealed.
    """
    from tasks.replay.expectations import check_episodes

    table = read_rows(workspace, sealed.manifest)
    checks = validate_rows(table, expected)
    kept = workspace.evidence / "validation"
    aside = kept / f".{sealed.manifest.name}-v{sealed.manifest.version:05d}"
    with file_lock(workspace.locks / "validation.lock", what=f"the validation of {sealed.manifest.subject}"):
        checkpoint = check_episodes(table, sealed.manifest.subject, aside)
        checks += [Check(**asdict(found)) for found in checkpoint.checks]
        reasons = tuple(f"{check.name}: {check.detail}" for check in checks if not check.ok)
        verdict: Literal["PASS", "FAIL"] = "FAIL" if reasons else "PASS"
        data = _record(sealed, expected, verdict, checks, checkpoint.record)
        # Named by its content: the ledger entry of an earlier validation still points to that one's files.
        folder = kept / f"{aside.name[1:]}-{sha256_bytes(data)[:16]}"
        write_atomic(aside / "validation.json", data)
        aside.rename(folder)
    evidence = {
        "path": workspace.relative(folder / "validation.json"),
        "sha256": sha256_bytes(data),
        "html": workspace.relative(folder / checkpoint.record["html"]),
    }
    report = ValidationReport(sealed.root, verdict, reasons, tuple(checks), evidence)
    ledger.append(VALIDATED, sealed.root, report.to_payload())
    return report


def validate_rows(table: pa.Table, expected: Expected) -> list[Check]:
    """Check the rows of `table` (columns of the replay schema); all checks run, whatever fails."""
    columns = table.combine_chunks()
    rows = _Rows(columns, expected)
    return [check(rows) for check in _CHECKS]


def _record(
    sealed: SealedDataset, expected: Expected, verdict: str, checks: Sequence[Check], suite: Mapping[str, Any]
) -> bytes:
    shown = {name: value for name, value in asdict(expected).items() if name != "evaluation_prompts"}
    record = {
        "root": sealed.root,
        "subject": sealed.manifest.subject,
        "verdict": verdict,
        "checks": [asdict(check) for check in checks],
        "expected": {**shown, "evaluation_prompts": len(expected.evaluation_prompts)},
        "great_expectations": suite,
    }
    return canonical_json(record) + b"\n"


class _Rows:
    """A table as numpy arrays: scalars per row, tokens flat with the row each belongs to."""

    def __init__(self, table: pa.Table, expected: Expected) -> None:
        import pyarrow.compute as pc

        self.table, self.expected, self.count = table, expected, table.num_rows
        names = ("prompt_ids", "response_ids", "loss_mask", "turn_ids", "behaviour_logprobs")
        self.lengths = {name: pc.list_value_length(table[name]).to_numpy() for name in names}
        want = self.lengths["response_ids"]
        self.misaligned: Flags = np.any([self.lengths[name] != want for name in names[2:]], axis=0)
        # Token-level checks need equal lengths; the rows without are counted once, by `lengths_aligned`.
        self.aligned = np.flatnonzero(~self.misaligned)
        even = table if not self.misaligned.any() else table.take(self.aligned)
        self.size = want[self.aligned]
        self.starts = (np.cumsum(self.size) - self.size)[
            self.size > 0
        ]  # first token of every row that has one
        self.ids = _flat(even["response_ids"])
        self.mask = _flat(even["loss_mask"])
        self.turns = _flat(even["turn_ids"])
        self.logprobs = _flat(even["behaviour_logprobs"])

    def scalar(self, name: str) -> np.ndarray[Any, Any]:
        """Return a column of one value a row."""
        values: np.ndarray[Any, Any] = self.table[name].to_numpy()
        return values

    def codes(self, name: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return a text column as integers, equal for equal texts."""
        codes: np.ndarray[Any, np.dtype[np.int64]] = (
            _encoded(self.table, name).indices.to_numpy().astype(np.int64)
        )
        return codes

    def texts(self, name: str, bad: Callable[[str], bool]) -> Flags:
        """Flag the rows whose text is `bad`; each distinct text is looked at once."""
        encoded = _encoded(self.table, name)
        wrong = np.array([bad(text) for text in encoded.dictionary.to_pylist()], dtype=bool)
        return wrong[encoded.indices.to_numpy()] if len(wrong) else np.zeros(0, dtype=bool)

    def rows_of(self, tokens: Flags) -> Flags:
        """Flag the rows that hold a flagged token."""
        ends = np.cumsum(self.size)
        flagged = np.zeros(self.count, dtype=bool)
        flagged[self.aligned[np.searchsorted(ends, np.flatnonzero(tokens), side="right")]] = True
        return flagged

    def report(self, name: str, bad: Flags, fault: str) -> Check:
        """Make the check `name` of flagged rows; the detail names the first of them."""
        failed = int(bad.sum())
        detail = f"all {self.count} rows"
        if failed:
            first = self.table["episode_id"][int(np.argmax(bad))].as_py()
            detail = f"{failed} of {self.count} rows {fault}, the first is {first}"
        return Check(name, failed == 0, failed, self.count, detail)


def _lengths_aligned(rows: _Rows) -> Check:
    empty = (rows.lengths["prompt_ids"] == 0) | (rows.lengths["response_ids"] == 0)
    fault = "have an empty prompt or response, or a mask, turn ids or log-probabilities of another length"
    return rows.report("lengths_aligned", rows.misaligned | empty, fault)


def _logprobs_finite(rows: _Rows) -> Check:
    bad = rows.rows_of(~np.isfinite(rows.logprobs))
    return rows.report("logprobs_finite", bad, "have a log-probability that is not a finite number")


def _logprobs_not_positive(rows: _Rows) -> Check:
    bad = rows.rows_of(rows.logprobs > _ROUNDING)
    return rows.report("logprobs_not_positive", bad, "have a log-probability above 0")


def _logprobs_masked(rows: _Rows) -> Check:
    bad = rows.rows_of(~rows.mask & (rows.logprobs != 0))
    return rows.report("logprobs_masked", bad, "have a log-probability where the policy sampled nothing")


def _policy_spoke(rows: _Rows) -> Check:
    bad = np.zeros(rows.count, dtype=bool)
    bad[rows.aligned[rows.size > 0]] = (
        ~np.logical_or.reduceat(rows.mask, rows.starts) if len(rows.mask) else False
    )
    return rows.report("policy_spoke", bad, "have no token that the policy sampled")


def _memory_told(rows: _Rows) -> Check:
    bad = rows.texts("reward_components", lambda components: memory_of(components) == BROKEN)
    return rows.report("memory_told", bad, "have a memory_turns that is no number of turns")


def _turns_ordered(rows: _Rows) -> Check:
    bad = np.zeros(len(rows.turns), dtype=bool)
    bad[1:] = (rows.turns[1:] != rows.turns[:-1]) & (rows.turns[1:] != rows.turns[:-1] + 1)
    bad[rows.starts] = rows.turns[rows.starts] != 0
    return rows.report("turns_ordered", rows.rows_of(bad), "have turn ids that do not count up from 0 by one")


def _tokens_known(rows: _Rows) -> Check:
    limit = rows.expected.vocabulary or np.iinfo(np.int32).max
    prompt = _flat(rows.table["prompt_ids"])
    outside = (prompt < 0) | (prompt >= limit)
    bad = rows.rows_of((rows.ids < 0) | (rows.ids >= limit))
    ends = np.cumsum(rows.lengths["prompt_ids"])
    bad[np.searchsorted(ends, np.flatnonzero(outside), side="right")] = True
    return rows.report("tokens_known", bad, "have a token id outside the policy's vocabulary")


def _episodes_unique(rows: _Rows) -> Check:
    codes = rows.codes("episode_id")
    bad = np.bincount(codes, minlength=1)[codes] > 1
    return rows.report("episodes_unique", bad, "share their episode id with another row")


def _groups_complete(rows: _Rows) -> Check:
    groups, places = rows.codes("group_id"), rows.scalar("sample_index").astype(np.int64)
    sizes = np.bincount(groups, minlength=1)
    # n distinct places within 0..n-1 are all of them: sum and range are checked, distinctness by sorting.
    order = np.lexsort((places, groups))
    starts = np.cumsum(sizes) - sizes
    due = np.arange(rows.count) - starts[groups[order]] if rows.count else places
    wrong = np.zeros(len(sizes), dtype=bool)
    wrong[groups[order][places[order] != due]] = True
    if rows.expected.group_size is not None:
        wrong |= sizes != rows.expected.group_size
    return rows.report("groups_complete", wrong[groups], "are in a group that lacks members or has one twice")


def _groups_share_prompt(rows: _Rows) -> Check:
    groups, prompts = rows.codes("group_id"), rows.codes("prompt_sha256")
    first = np.zeros(groups.max(initial=-1) + 1, dtype=np.int64)
    first[groups[::-1]] = prompts[::-1]
    wrong = np.zeros(len(first), dtype=bool)
    wrong[groups[prompts != first[groups]]] = True
    return rows.report("groups_share_prompt", wrong[groups], "are in a group of several prompts")


def _tokenizer_matches(rows: _Rows) -> Check:
    want = rows.expected.tokenizer_digest
    bad = rows.texts("tokenizer_digest", lambda digest: digest != want)
    return rows.report(
        "tokenizer_matches", bad, f"were tokenised by another tokenizer than the policy's ({want[:12]})"
    )


def _template_matches(rows: _Rows) -> Check:
    want = rows.expected.template_digest
    bad = rows.texts("template_digest", lambda digest: digest != want)
    return rows.report(
        "template_matches", bad, f"were made with another chat template than the policy's ({want[:12]})"
    )


def _policy_lag(rows: _Rows) -> Check:
    expected = rows.expected
    stale = _lags(rows.table, expected.policy_version) > expected.max_policy_lag
    usable = len(np.unique(rows.codes("group_id")[~stale]))
    detail = (
        f"{usable} groups within {expected.max_policy_lag} versions of agent/{expected.policy_version}, "
        f"{expected.min_groups} are needed; {int(stale.sum())} of {rows.count} rows are older and passed over"
    )
    return Check("policy_lag", usable >= expected.min_groups, int(stale.sum()), rows.count, detail)


def _no_evaluation_prompt(rows: _Rows) -> Check:
    held = rows.expected.evaluation_prompts
    bad = rows.texts("prompt_sha256", held.__contains__) | rows.texts("split", lambda split: split != "train")
    return rows.report(
        "no_evaluation_prompt",
        bad,
        "are on a prompt that agents are evaluated on, or of another split than train",
    )


def _rewards_finite(rows: _Rows) -> Check:
    return rows.report(
        "rewards_finite", ~np.isfinite(rows.scalar("reward")), "have a reward that is not a finite number"
    )


def _sampling_known(rows: _Rows) -> Check:
    temperature, top_p = rows.scalar("temperature"), rows.scalar("top_p")
    good = np.isfinite(temperature) & (temperature > 0) & (top_p > 0) & (top_p <= 1)
    return rows.report(
        "sampling_known", ~good, "have a temperature that is not above 0 or a top-p outside (0, 1]"
    )


def _provenance_present(rows: _Rows) -> Check:
    names = ("source", "licence", "behaviour_version", "reward_digest")
    bad = np.any([rows.texts(name, lambda text: not text.strip()) for name in names], axis=0)
    return rows.report("provenance_present", bad, "lack their source, licence, behaviour or verifier")


def _logprob_source_known(rows: _Rows) -> Check:
    check = rows.report(
        "logprob_source_known",
        rows.texts("logprob_source", lambda source: source not in _SOURCES),
        f"say where their log-probabilities come from in words other than {', '.join(_SOURCES)}",
    )
    missing = int(rows.texts("logprob_source", lambda source: source == "missing").sum())
    if not missing:
        return check
    note = f"; {missing} rows have none: objectives that need them refuse those"
    return Check(check.name, check.ok, check.failed, check.of, check.detail + note)


_CHECKS: Sequence[Callable[[_Rows], Check]] = (
    _lengths_aligned,
    _logprobs_finite,
    _logprobs_not_positive,
    _logprobs_masked,
    _logprob_source_known,
    _policy_spoke,
    _memory_told,
    _turns_ordered,
    _tokens_known,
    _episodes_unique,
    _groups_complete,
    _groups_share_prompt,
    _tokenizer_matches,
    _template_matches,
    _sampling_known,
    _policy_lag,
    _no_evaluation_prompt,
    _rewards_finite,
    _provenance_present,
)


def _encoded(table: pa.Table, name: str) -> pa.DictionaryArray:
    return _whole(table[name]).dictionary_encode()


def _flat(column: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = _whole(column).flatten().to_numpy(zero_copy_only=False)
    return values


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array, without a copy where it is one already."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _lags(table: pa.Table, policy_version: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the registry versions that each row's behaviour is behind the policy; 0 for behaviours outside
    the registry.
    """
    encoded = _encoded(table, "behaviour_version")
    lags = [
        policy_version - _registry_version(name, policy_version) for name in encoded.dictionary.to_pylist()
    ]
    return np.array(lags, dtype=np.int64)[encoded.indices.to_numpy()] if lags else np.zeros(0, dtype=np.int64)


def _registry_version(name: str, default: int) -> int:
    kind, _, number = name.partition("/")
    return int(number) if kind == "agent" and number.isdecimal() else default
