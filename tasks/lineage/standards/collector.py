"""Sends OpenLineage events to a collector over HTTP, as Marquez and others receive them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from tasks.core.digest import canonical_json
from tasks.core.errors import Unavailable, UsageError

PATH = "/api/v1/lineage"
_TIMEOUT = 30.0  # seconds for one event


def address_of(url: str) -> httpx.URL:
    """Return where a collector takes events; without a path in `url`, that is `/api/v1/lineage`.

    Raises:
        UsageError: `url` is no HTTP address.
    """
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL:
        raise UsageError(
            f"`{url}` is no address of a collector; give one like http://localhost:5000."
        ) from None
    if address.scheme not in ("http", "https") or not address.host:
        raise UsageError(f"`{url}` is no address of a collector; give one like http://localhost:5000.")
    if address.path in ("", "/"):
        address = address.copy_with(path=PATH)
    return address


def post(url: str, events: Sequence[Mapping[str, Any]]) -> int:
    """Post events one by one, in order, and return how many; run ids are stable, so sending again repeats nothing.

    Raises:
        UsageError: see `address_of`. Unavailable: the collector is away or refused an event.
    """
    address = address_of(url)
    shown = address.copy_with(username=None, password=None, query=None)
    with httpx.Client(timeout=_TIMEOUT) as client:
        for number, event in enumerate(events, start=1):
            where = f"event {number} of {len(events)}"
            try:
                answer = client.post(
                    address, content=canonical_json(event), headers={"Content-Type": "application/json"}
                )
            except httpx.HTTPError as error:
                raise Unavailable(
                    f"The collector {shown} did not take {where} ({type(error).__name__}: {error}); look whether it "
                    "runs and export again."
                ) from None
            if not answer.is_success:
                said = " ".join(answer.text.split())[:200]
                raise Unavailable(
                    f"The collector {shown} refused {where}: HTTP {answer.status_code} {said}; its log says why, "
                    "and exporting again is safe."
                )
    return len(events)
