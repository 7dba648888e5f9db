"""Keys: files only their owner reads, a list of trust that names whom it refuses, and a published Ed25519 vector."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tasks.core.digest import sha256_bytes
from tasks.core.errors import Conflict, NotFound, Refused, UsageError
from tasks.core.keys import (
    PrivateKey,
    Trust,
    create_key,
    load_key,
    load_public,
    read_trust,
    trusted,
    write_trust,
)


def test_signature_of_rfc_8032():
    """Section 7.1, TEST 2."""
    secret = "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"
    public = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    signature = (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    key = PrivateKey("rfc", Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret)))
    assert key.public.hex() == public
    assert key.sign(b"\x72").hex() == signature
    assert key.id == sha256_bytes(bytes.fromhex(public))
    side = trusted(key, "service")
    assert side.verify(bytes.fromhex(signature), b"\x72")
    assert not side.verify(bytes.fromhex(signature), b"\x73")


def test_a_key_is_private_from_the_first_byte_and_never_overwritten(tmp_path: Path):
    path = tmp_path / "keys" / "service.key"
    key = create_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert load_key(path).public == key.public == load_public(path.with_suffix(".pub"))
    before = path.read_bytes()
    with pytest.raises(Conflict, match="not overwritten"):
        create_key(path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["service.key", "service.pub"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_key_that_others_can_read_or_write_is_refused(tmp_path: Path, mode: int):
    path = tmp_path / "service.key"
    create_key(path)
    path.chmod(mode)
    with pytest.raises(Refused, match=rf"service\.key can be read by others \(mode {mode:04o}\)"):
        load_key(path)


def test_what_is_no_key_is_told(tmp_path: Path):
    with pytest.raises(NotFound, match="keys init"):
        load_key(tmp_path / "none.key")
    path = tmp_path / "a.key"
    path.write_bytes(b"-----BEGIN NOTHING-----")
    path.chmod(0o600)
    with pytest.raises(UsageError, match="not an unencrypted Ed25519 key"):
        load_key(path)
    create_key(tmp_path / "b.key")
    with pytest.raises(UsageError, match="holds a private key"):
        load_public(tmp_path / "b.key")


def test_trust_survives_its_file(tmp_path: Path):
    kim, lee = (create_key(tmp_path / f"{name}.key") for name in ("kim", "lee"))
    trust = Trust().add(trusted(kim, "approver")).add(trusted(lee, "service")).remove("kim", 7)
    write_trust(tmp_path / "keys.yaml", trust)
    assert read_trust(tmp_path / "keys.yaml") == trust
    assert trust.check(kim.id, "approver", at=7).name == "kim"


def test_trust_names_whom_it_refuses(tmp_path: Path):
    kim, lee, eve = (create_key(tmp_path / f"{name}.key") for name in ("kim", "lee", "eve"))
    trust = Trust().add(trusted(kim, "approver")).add(trusted(lee, "service"))
    with pytest.raises(Refused, match=f"{eve.id[:12]}… is not in keys.yaml"):
        trust.check(eve.id, "approver")
    with pytest.raises(Refused, match=r"`lee` .* is the key of the service and may .*, not approve"):
        trust.check(lee.id, "approver")
    gone = trust.remove("kim", 7)
    for at in (None, 8):
        with pytest.raises(Refused, match=r"`kim` .* was removed .* after ledger entry 7"):
            gone.check(kim.id, "approver", at)
    with pytest.raises(NotFound, match="trusted here: lee"):
        gone.remove("kim", 9)


def test_one_key_has_one_role_and_one_name(tmp_path: Path):
    kim, lee = (create_key(tmp_path / f"{name}.key") for name in ("kim", "lee"))
    trust = Trust().add(trusted(kim, "service"))
    assert trust.add(trusted(kim, "service")) is trust
    with pytest.raises(Conflict, match="already known as `kim`, the service"):
        trust.add(trusted(kim, "approver"))
    with pytest.raises(Conflict, match="another key called `kim`"):
        trust.add(trusted(lee, "approver").model_copy(update={"name": "kim"}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys: [{name: kim, role: boss, public: AA}]", "keys.0.role"),
        ("keys: [{name: kim, role: approver, public: AA==}]", "has 32 bytes, not 1"),
        ("keys: [{name: kim, role: approver, pubic: AA==}]", "did you mean `public`"),
        (
            f"keys: [{{name: a, role: service, public: {'A' * 43}=}}, {{name: a, role: service, public: {'B' * 43}=}}]",
            "name a stands there twice",
        ),
    ],
)
def test_a_bad_list_of_trust_is_told(tmp_path: Path, text: str, message: str):
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_trust(path)
