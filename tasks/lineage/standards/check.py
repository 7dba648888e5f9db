"""Checks an export: who signed each attestation, and whether the files it is about are still those."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tasks.core.digest import sha256_file
from tasks.core.dsse import Statement, open_envelope
from tasks.core.errors import Corrupt, ForebayError, NotFound
from tasks.core.keys import Trust
from tasks.core.workspace import Workspace

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
    """What a check found: how many signatures and digests hold, and what does not."""

    signatures: int
    digests: int
    misfits: tuple[Misfit, ...]

    @property
    def ok(self) -> bool:
        """Everything fits."""
        return not self.misfits


def check(folder: Path, workspace: Workspace, trust: Trust) -> Checked:
    """Verify every attestation in an export, and hash the files it is about.

    Raises:
        NotFound: there is no export with attestations in `folder`.
    """
    paths = sorted(path for path in folder.glob(f"{ATTESTATIONS}/*.dsse.json") if path.is_file())
    whole = folder / WHOLE
    if not whole.exists() and not paths:
        raise NotFound(
            f"There are no attestations in {folder}; `forebay export --as all --output {folder}` writes them."
        )
    signatures = digests = 0
    misfits: list[Misfit] = []
    if not whole.exists():
        misfits.append(Misfit(WHOLE, None, "The attestation of the whole export is missing."))
    for path in [*([whole] if whole.exists() else []), *paths]:
        name = path.relative_to(folder).as_posix()
        try:
            said = open_envelope(
                path.read_bytes(), ("export", "provenance", "gate-decision"), trust, "service"
            )
        except ForebayError as error:
            misfits.append(Misfit(name, None, str(error)))
            continue
        signatures += 1
        found = [(subject, _fault(file, sha256)) for subject, file, sha256 in _files(said, folder, workspace)]
        digests += sum(fault is None for _, fault in found)
        misfits += [Misfit(name, subject, fault) for subject, fault in found if fault is not None]
    misfits += _unclaimed(folder, whole, trust)
    return Checked(signatures, digests, tuple(misfits))


def _files(said: Statement, folder: Path, workspace: Workspace) -> Iterator[tuple[str, Path, str]]:
    """Yield each subject of a statement, the file it names, and the digest it must have."""
    for name, sha256 in said.subjects.items():
        if said.kind == "gate-decision":
            yield name, workspace.evidence / "decisions" / f"{sha256}.json", sha256
        else:
            yield name, (folder if said.kind == "export" else workspace.root) / name, sha256


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


def _unclaimed(folder: Path, whole: Path, trust: Trust) -> Iterator[Misfit]:
    """Files that lie in the export and are not of it: somebody may take them for signed."""
    try:
        said = open_envelope(whole.read_bytes(), ("export",), trust, "service")
    except (OSError, Corrupt, ForebayError):
        return
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path != whole and name not in said.subjects:
            yield Misfit(WHOLE, name, f"{name} lies in the export but is not part of it.")
