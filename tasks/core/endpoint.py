"""An HTTP API that is asked for JSON: an address, a key from the environment, patience, and no key in any message.

Time-outs, broken connections, 408/409/425/429, 5xx and replies that do not read are asked again after growing pauses;
any other status is the server's refusal. A key goes into one header and is stored nowhere.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from tasks.core.errors import Refused, Unavailable, UsageError

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0


class Garbled(Exception):
    """A reply is not what was asked for; the same request may well be answered the next time."""


@dataclass(frozen=True)
class Endpoint:
    """Where a server is and how it is asked.

    Attributes:
        url: base address; paths are added to it.
        section: of the settings that it comes from, for messages ("reward.model").
        who: is asked, for messages ("The judge").
        kept: what the user should know when it stays silent, the end of a sentence.
        api_key_env: environment variable that holds the key.
        retries: after the first attempt.
        pause: waits between attempts; a test replaces it.
    """

    url: str
    section: str
    who: str
    kept: str
    api_key_env: str | None = None
    timeout_s: float = 60.0
    retries: int = 5
    pause: Callable[[float], None] = field(default=time.sleep, repr=False)

    def check(self) -> None:
        """Find out, without asking anything, whether this can be asked.

        Raises:
            UsageError: the address is no plain one, or the key's variable holds no key.
        """
        require_plain_url(self.url, self.section)
        variable, key = self.api_key_env, self._key()
        owner = self.who.removeprefix("The ")
        if variable and not key:
            raise UsageError(f"The environment variable {variable} with the {owner}'s API key is not set.")
        if not (key.isascii() and key.isprintable()):
            raise UsageError(
                f"The environment variable {variable} holds no API key: it has control or non-ASCII characters."
            )

    def client(self, connections: int) -> httpx.Client:
        """Return a client for as many connections at once; close it after use."""
        import httpx

        key = self._key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        return httpx.Client(timeout=self.timeout_s, headers=headers, limits=limits)

    def ask(
        self, client: httpx.Client, path: str, body: dict[str, Any] | None, read: Callable[[Any], T]
    ) -> T:
        """POST `body` (or GET, where there is none) and return what `read` makes of the reply's JSON value.

        `read` raises `Garbled` for a value that it cannot use.

        Raises:
            Unavailable: no usable reply in all attempts.
            Refused: the server refuses the request itself.
        """
        import httpx

        url = f"{self.url.rstrip('/')}/{path}"
        problem = ""
        for attempt in range(self.retries + 1):
            asked_to_wait = None
            try:
                response = client.get(url) if body is None else client.post(url, json=body)
                if response.status_code == 200:
                    return read(_json(response))
                problem = f"it said {response.status_code}: {self.hide(response.text)[:200]}"
                if response.status_code not in _AGAIN:
                    raise Refused(f"{self.who} at {url} refuses the request; {problem}")
                asked_to_wait = response.headers.get("retry-after")
            except (httpx.HTTPError, Garbled) as error:
                problem = f"{type(error).__name__}: {self.hide(str(error))[:200]}"
            if attempt < self.retries:
                self.pause(_pause(attempt, asked_to_wait))
        raise Unavailable(
            f"{self.who} at {url} did not answer in {self.retries + 1} attempts ({problem}); {self.kept}."
        )

    def hide(self, text: str) -> str:
        """Return what a server or a library said, without the key."""
        key = self._key()
        return text.replace(key, "<key>") if key else text

    def _key(self) -> str:
        """The API key, "" where none is asked for; mounted secrets end with a line break."""
        return os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""


def require_plain_url(url: str, section: str) -> None:
    """Refuse an address that cannot be asked, or that may hold a secret: the address is recorded.

    Raises:
        UsageError: it is no http(s) address, or has a user, a query or a fragment; it is not repeated.
    """
    import httpx

    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        parts = httpx.URL()
    if parts.scheme not in ("http", "https") or not parts.host:
        raise UsageError(f"{section}.url is no http or https address.")
    if parts.userinfo or parts.query or parts.fragment:
        raise UsageError(
            f"{section}.url has a user, a query or a fragment, and it is recorded; put the key into an environment "
            f"variable and name that in {section}.api_key_env."
        )


def chat_content(reply: Any) -> str:
    """The text of a chat completion, "" where it has none; a `read` of `Endpoint.ask`.

    Raises:
        Garbled: it is no chat completion.
    """
    try:
        content = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise Garbled(f"the reply is no chat completion: {json.dumps(reply)}") from None
    return content if isinstance(content, str) else ""


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except (ValueError, RecursionError):
        raise Garbled(f"the reply is no JSON: {response.text}") from None


def _pause(attempt: int, asked: str | None) -> float:
    """Seconds before the next attempt: what the server asks for, else doubled each time, with jitter."""
    if asked is not None and re.fullmatch(r"\d{1,4}", asked):
        return min(float(asked), _LONGEST_PAUSE)
    doubled: float = min(_FIRST_PAUSE * 2.0**attempt, _LONGEST_PAUSE)
    return doubled * random.uniform(0.5, 1.0)
