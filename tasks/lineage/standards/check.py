"""Checks an export: who signed each attestation, and whether the files it is about are still those."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from tasks.core.digest import sha256_bytes, sha256_file
from tasks.core.dsse import open_envelope
from tasks.core.errors import ForebayError, NotFound
from tasks.core.keys import Trust
from tasks.core.ledger import Entry
from tasks.core.workspace import Workspace
from tasks.promotion.attest import check_decision

ATTESTATIONS = "attestations"
WHOLE = "export.dsse.json"
"""The attestation of all other files of an export."""


@dataclass(frozen=True)
class Misfit:
    """Something that an export says and that does not hold.

    Attributes:
        attestation: the file in the export that says it.
        subject: the file it is about; None where the attestation itself is at fault.
        says: what is wrong, in a sentence.
    """

    attestation: str
    subject: str | None
    says: str


@dataclass(frozen=True)
class Checked:
    """What a check found: how many signatures and digests hold, what does not, and what was erased on purpose."""

    signatures: int
    digests: int
    misfits: tuple[Misfit, ...]
    erased: tuple[Misfit, ...] = ()

    @property
    def ok(self) -> bool:
        """Everything fits; that bytes were erased on purpose is no misfit."""
        return not self.misfits


def check(
    folder: Path,
    workspace: Workspace,
    trust: Trust,
    made: Iterable[Entry],
    erasures: Mapping[str, str] = MappingProxyType({}),
) -> Checked:
    """Verify every attestation in an export, and hash the files it is about.

    Args:
        made: the ledger's decisions. The key of a decision is judged as of when it was made, every other as of now.
        erasures: {SHA-256 of a file that was erased on purpose: what was revoked, and why}.

    Raises:
        NotFound: there is no export with attestations in `folder`.
    """
    whole = folder / WHOLE
    paths = [path for path in (whole, *sorted(folder.glob(f"{ATTESTATIONS}/*.dsse.json"))) if path.is_file()]
    if not paths:
        raise NotFound(
            f"There are no attestations in {folder}; `forebay export --as all --output {folder}` writes them."
        )
    decisions = {e.payload["signature"]["sha256"]: e for e in made if "signature" in e.payload}
    signatures = digests = 0
    misfits: list[Misfit] = []
    erased: list[Misfit] = []
    if whole not in paths:
        misfits.append(Misfit(WHOLE, None, "The attestation of the whole export is missing."))
    for path in paths:
        name = path.relative_to(folder).as_posix()
        try:
            files = _files(path.read_bytes(), folder, workspace, trust, decisions)
        except OSError as error:
            misfits.append(Misfit(name, None, f"{name} cannot be read: {error.strerror}."))
            continue
        except ForebayError as error:
            misfits.append(Misfit(name, None, str(error)))
            continue
        signatures += 1
        for subject, (file, sha256) in files.items():
            if sha256 in erasures and not file.exists():
                says = f"{file.name} was erased on purpose ({erasures[sha256]})."
                erased.append(Misfit(name, subject, says))
        gone = {misfit.subject for misfit in erased if misfit.attestation == name}
        faults = [(subject, _fault(*there)) for subject, there in files.items() if subject not in gone]
        digests += sum(fault is None for _, fault in faults)
        misfits += [Misfit(name, subject, fault) for subject, fault in faults if fault is not None]
        if path == whole:
            misfits += _unclaimed(folder, files.keys())
    return Checked(signatures, digests, tuple(misfits), tuple(erased))


def _files(
    envelope: bytes, folder: Path, workspace: Workspace, trust: Trust, decisions: Mapping[str, Entry]
) -> dict[str, tuple[Path, str]]:
    """Return the files that a genuine statement is about, and the digests they must have, by subject."""
    entry = decisions.get(sha256_bytes(envelope))
    if entry is not None:
        check_decision(entry, envelope, trust, at=entry.seq)
        record = entry.payload["record"]
        return {record["path"]: (workspace.root / record["path"], record["sha256"])}
    said = open_envelope(envelope, ("export", "provenance"), trust, "service")
    place = folder if said.kind == "export" else workspace.root
    return {name: (place / name, sha256) for name, sha256 in said.subjects.items()}


def _fault(file: Path, sha256: str) -> str | None:
    try:
        found = sha256_file(file)
    except FileNotFoundError:
        return f"{file.name} is missing; its SHA-256 was {sha256[:12]}…."
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror}."
    return (
        None
        if found == sha256
        else f"{file.name} was changed: its SHA-256 is {found[:12]}…, attested is {sha256[:12]}…."
    )


def _unclaimed(folder: Path, claimed: Collection[str]) -> Iterator[Misfit]:
    """Files that lie in the export and are not of it: somebody may take them for signed."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != WHOLE and name not in claimed:
            yield Misfit(WHOLE, name, f"{name} lies in the export but is not part of it.")
