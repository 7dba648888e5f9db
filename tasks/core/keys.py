"""Signing keys: Ed25519 pairs in files only their owner can read, and the list of public keys a workspace trusts.

A private key is an unencrypted PKCS #8 PEM file with mode 0600. A key's id is the SHA-256 of its 32 public bytes.
Trust is a file in the workspace's git, `keys.yaml`, so that a change of who may sign is a change somebody reviews.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from pydantic import Field, field_validator

from tasks.core.atomic import fsync_dir, write_atomic
from tasks.core.digest import sha256_bytes
from tasks.core.errors import Conflict, NotFound, Refused, UsageError
from tasks.core.settings import Section, load_section

Role = Literal["service", "approver"]
NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_MAY = {"service": "sign decisions and the ledger", "approver": "approve and reject"}
_HEADER = """\
# The public keys this workspace trusts, written by `forebay keys`. Keep it in git: who stands here may sign.
# service: signs decisions and the ledger's head. approver: a person who may approve or reject a decision.
"""


@dataclass(frozen=True)
class PrivateKey:
    """A key that can sign; `name` is that of its file."""

    name: str
    _key: Ed25519PrivateKey

    @cached_property
    def public(self) -> bytes:
        """The 32 bytes of the public key."""
        return self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    @property
    def id(self) -> str:
        """The SHA-256 of the public key."""
        return sha256_bytes(self.public)

    def sign(self, data: bytes) -> bytes:
        """Return the 64 bytes of the signature; the same data gives the same signature."""
        return self._key.sign(data)


class TrustedKey(Section):
    """One public key, whose it is, and what it may sign."""

    name: str = Field(pattern=NAME)
    role: Role
    public: str = Field(description="base64 of the 32 bytes of an Ed25519 public key")
    removed: int | None = Field(None, ge=0, description="ledger entry after which the key counts no more")

    @field_validator("public")
    @classmethod
    def _is_a_key(cls, value: str) -> str:
        try:
            raw = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("not base64") from None
        if len(raw) != 32:
            raise ValueError(f"an Ed25519 public key has 32 bytes, not {len(raw)}")
        return value

    @property
    def raw(self) -> bytes:
        """The 32 bytes of the public key."""
        return base64.b64decode(self.public)

    @property
    def id(self) -> str:
        """The SHA-256 of the public key."""
        return sha256_bytes(self.raw)

    def verify(self, signature: bytes, data: bytes) -> bool:
        """Tell whether `signature` is this key's over `data`."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, data)
        except InvalidSignature:
            return False
        return True


class _TrustFile(Section):
    version: Literal[1] = 1
    keys: tuple[TrustedKey, ...] = ()


@dataclass(frozen=True)
class Trust:
    """The public keys a workspace trusts, and those it trusted once."""

    keys: tuple[TrustedKey, ...] = ()

    def find(self, key_id: str) -> TrustedKey | None:
        """Return the key with this id, removed ones included."""
        return next((key for key in self.keys if key.id == key_id), None)

    def named(self, name: str) -> TrustedKey | None:
        """Return the key of this name, removed ones included."""
        return next((key for key in self.keys if key.name == name), None)

    def active(self, role: Role) -> list[TrustedKey]:
        """Return the keys that may sign in this role now."""
        return [key for key in self.keys if key.role == role and key.removed is None]

    def check(self, key_id: str, role: Role, at: int | None = None) -> TrustedKey:
        """Return the key if it may sign in this role.

        Args:
            at: ledger entry that carries the signature; a key removed later was good then. None: now.

        Raises:
            Refused: the key is unknown, removed, or has another role; it is named.
        """
        key = self.find(key_id)
        if key is None:
            raise Refused(
                f"The key {key_id[:12]}… is not in keys.yaml; `forebay keys trust FILE` takes in the public key "
                "of somebody you know."
            )
        if key.role != role:
            raise Refused(
                f"`{key.name}` ({key_id[:12]}…) is the key of {_article(key.role)} and may "
                f"{_MAY[key.role]}, not {_MAY[role]}."
            )
        if key.removed is not None and (at is None or at > key.removed):
            raise Refused(
                f"`{key.name}` ({key_id[:12]}…) was removed from the trusted keys after ledger entry {key.removed}."
            )
        return key

    def add(self, key: TrustedKey) -> Trust:
        """Return the trust with one more key; the same key again changes nothing.

        Raises:
            Conflict: the name or the key is taken; a key has one role, so that nobody approves for the service.
        """
        same = self.find(key.id)
        if same is not None:
            if (same.name, same.role, same.removed) == (key.name, key.role, None):
                return self
            was = "" if same.removed is None else ", removed,"
            raise Conflict(
                f"The key {key.id[:12]}… is already known{was} as `{same.name}`, {_article(same.role)}; "
                "make another key for another role."
            )
        if self.named(key.name) is not None:
            raise Conflict(f"There is another key called `{key.name}` in keys.yaml; give --name.")
        return Trust((*self.keys, key))

    def remove(self, name: str, at: int) -> Trust:
        """Return the trust in which `name` counts no more after ledger entry `at`; what it signed before stands.

        Raises:
            NotFound: no key that counts has this name.
        """
        key = self.named(name)
        if key is None or key.removed is not None:
            known = ", ".join(k.name for k in self.keys if k.removed is None) or "none"
            raise NotFound(f"No trusted key is called `{name}`; trusted here: {known}.")
        return Trust(tuple(k.model_copy(update={"removed": at}) if k is key else k for k in self.keys))


def trusted(key: PrivateKey, role: Role) -> TrustedKey:
    """Return the public side of `key` in a role."""
    return TrustedKey(name=key.name, role=role, public=base64.b64encode(key.public).decode(), removed=None)


def read_trust(path: Path) -> Trust:
    """Read `keys.yaml`.

    Raises:
        UsageError: it is missing or not valid; the key of the file that is wrong is named.
    """
    keys = load_section(_TrustFile, path).keys
    for what, values in (("name", [k.name for k in keys]), ("public key", [k.public for k in keys])):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise UsageError(f"{path.name}: the {what} {twice[0]} stands there twice; remove one.")
    return Trust(keys)


def write_trust(path: Path, trust: Trust) -> None:
    """Write `keys.yaml` whole."""
    write_atomic(path, trust_bytes(trust))


def trust_bytes(trust: Trust) -> bytes:
    """Return what `write_trust` writes."""
    keys = [key.model_dump(mode="json", exclude_none=True) for key in trust.keys]
    text = yaml.safe_dump({"version": 1, "keys": keys}, sort_keys=False, width=200)
    return (_HEADER + text).encode()


def create_key(path: Path) -> PrivateKey:
    """Make a key: the private one in `path` (mode 0600), the public one beside it with the suffix .pub.

    Raises:
        Conflict: there is a file already; a key is never overwritten.
    """
    key = Ed25519PrivateKey.generate()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600 from the start
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            stream.flush()
            os.fsync(stream.fileno())
        os.link(aside, path)  # unlike a rename, fails where there is a file
        fsync_dir(path.parent)
    except FileExistsError:
        raise Conflict(f"There is a key in {path} already; it is not overwritten.") from None
    finally:
        os.unlink(aside)
    write_atomic(
        path.with_suffix(".pub"),
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    )
    return PrivateKey(path.stem, key)


def load_key(path: Path) -> PrivateKey:
    """Read a private key.

    Raises:
        NotFound: there is none. UsageError: the file is no Ed25519 key.
        Refused: others than its owner can read or write the file.
    """
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"There is no private key in {path}; `forebay keys init` makes one.") from None
    if mode & 0o077:
        raise Refused(
            f"The private key {path} can be read by others (mode {mode:04o}); they may have copied it: make a new "
            f"key, or if you are sure that nobody did, `chmod 600 {path}`."
        )
    key = _pem(load_pem_private_key, data, path, None)
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path} is not an Ed25519 private key.")
    return PrivateKey(path.stem, key)


def load_public(path: Path) -> bytes:
    """Read a public key (PEM) and return its 32 bytes.

    Raises:
        NotFound: there is none. UsageError: the file is no Ed25519 public key.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"There is no public key in {path}; ask its owner for the file NAME.pub.") from None
    if b"PRIVATE KEY" in data:
        raise UsageError(
            f"{path} holds a private key, which must stay with its owner; give the file NAME.pub."
        )
    key = _pem(load_pem_public_key, data, path)
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"{path} is not an Ed25519 public key.")
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def _pem(load: Any, data: bytes, path: Path, *more: None) -> Any:
    try:
        return load(data, *more)
    except (ValueError, TypeError):
        raise UsageError(f"{path} is not an unencrypted Ed25519 key in PEM format.") from None


def _article(role: Role) -> str:
    return "the service" if role == "service" else "an approver"
