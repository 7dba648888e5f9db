"""Exports of a lineage in the formats of others, written to a folder, and the check of such a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows import keys
from flows.context import Context
from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, sha256_bytes
from tasks.core.dsse import sign
from tasks.core.errors import UsageError
from tasks.lineage.standards import attestations, cyclonedx, model_card, openlineage, prov
from tasks.lineage.standards.check import ATTESTATIONS, WHOLE, check
from tasks.lineage.standards.collector import address_of, post
from tasks.lineage.standards.material import Material, erasures, gather, name_of

FORMATS = ("intoto", "openlineage", "cyclonedx", "card", "prov")
_OF_AGENTS = ("cyclonedx", "card")
_DOCUMENTS: Mapping[str, tuple[str, Callable[[Material], bytes]]] = {
    "openlineage": ("openlineage.ndjson", lambda m: openlineage.to_lines(openlineage.events(m))),
    "cyclonedx": ("bom.cdx.json", lambda m: canonical_json(cyclonedx.bom(m)) + b"\n"),
    "card": ("README.md", lambda m: model_card.card(m).encode()),
    "prov": ("prov.json", lambda m: canonical_json(prov.document(m)) + b"\n"),
}


def export(
    context: Context, ref: str, formats: Sequence[str], folder: Path | None, collector: str | None = None
) -> dict[str, Any]:
    """Write the exports of `ref` into `folder` and send its events to `collector`, where these are given.

    Everything is made before anything is written, and written before anything is sent. "all" stands for every format that `ref` has.

    Returns:
        {ref, files: {name: SHA-256}, sent: events the collector took, unsigned: decisions without a signature}

    Raises:
        UsageError: a format is unknown, or `ref` has none of that kind. NotFound, Corrupt: see `gather`.
        Refused: attestations are wanted and the workspace cannot sign. Unavailable: see `post`.
    """
    odd = [name for name in formats if name not in (*FORMATS, "all")]
    if odd:
        raise UsageError(f"There is no format `{odd[0]}`; there are {', '.join(FORMATS)} and all.")
    material = gather(context.ledger, context.workspace, ref)
    wanted = set(formats)
    if "all" in formats:
        wanted = {n for n in FORMATS if n not in _OF_AGENTS or material.lineage.root[0] == "agent"}
    key = keys.service_key(context) if "intoto" in wanted else None
    files = {name: make(material) for form, (name, make) in _DOCUMENTS.items() if form in wanted}
    if key is not None:
        attested = attestations.attest(material, key)
        files |= {f"{ATTESTATIONS}/{name}": data for name, data in attested.items()}
        digests = {name: sha256_bytes(data) for name, data in files.items()}
        about = {
            "ref": name_of(material.lineage.root),
            "digest": material.root.digest,
            "ledger": material.ledger,
        }
        files[WHOLE] = sign("export", digests, about, key)
    if collector is not None:
        address_of(collector)  # a wrong one is said before anything is written
    if folder is not None:
        _write(folder, files)
    sent = 0 if collector is None else post(collector, openlineage.events(material))
    unsigned = [ref for ref, _ in material.of("decision") if ref not in material.signatures]
    return {
        "ref": name_of(material.lineage.root),
        "files": {name: sha256_bytes(data) for name, data in sorted(files.items())} if folder else {},
        "sent": sent,
        "unsigned": [digest for _, digest in unsigned] if key is not None else [],
    }


def check_export(context: Context, folder: Path) -> dict[str, Any]:
    """Verify an export's signatures and the digests of what they are about; see `check`."""
    made = context.ledger.entries("decision.made")
    found = check(folder, context.workspace, keys.trust(context), made, erasures(context.ledger))
    return {"ok": found.ok, **asdict(found)}


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write an export; attestations that an earlier one left there and this one has not go away."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be a folder to write to ({error.strerror}); choose another with --output."
        ) from None
    for name, data in files.items():
        write_atomic(folder / name, data)
    if WHOLE in files:
        for path in folder.glob(f"{ATTESTATIONS}/*.dsse.json"):
            if f"{ATTESTATIONS}/{path.name}" not in files:
                path.unlink()
