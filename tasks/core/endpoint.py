"""An OpenAI-compatible endpoint: chat completions asked for with patience, and an API key that is stored nowhere.

The key comes from an environment variable and goes into one header; what a server or a library says is repeated
without it.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tasks.core.errors import Refused, Unavailable, UsageError

if TYPE_CHECKING:
    import httpx

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0


@dataclass(frozen=True)
class Endpoint:
    """Where a model is served, and how patiently it is asked.

    Attributes:
        url: base address, without the path of the chat completions.
        model: the name that it is served by.
        api_key_env: environment variable that holds the key; None where there is none.
        timeout_s: seconds until an attempt is given up.
        retries: attempts after the first, with growing pauses.
        who: what the model is here, as in "The judge".
        setting: what a setting of the model is called in messages, with {} for `url`, `model` or `api_key_env`.
        advice: what to do when it stays away, for a message.
        pause: waits between attempts; a test replaces it.
    """

    url: str
    model: str
    api_key_env: str | None
    timeout_s: float
    retries: int
    who: str
    setting: str
    advice: str = "try again later"
    pause: Callable[[float], None] = field(default=time.sleep, repr=False)

    def check(self) -> None:
        """Refuse settings with which nothing can be asked.

        Raises:
            UsageError: there is no model, no plain address, or no key in the key's variable.
        """
        if not self.model:
            raise UsageError(
                f"The {self.who} has no model; set {self.setting.format('model')} to the name its endpoint serves."
            )
        require_plain_url(self.url, self.setting)
        variable, key = self.api_key_env, self._key()
        if variable and not key:
            raise UsageError(f"The environment variable {variable} with the {self.who}'s API key is not set.")
        if not (key.isascii() and key.isprintable()):
            raise UsageError(
                f"The environment variable {variable} holds no API key: it has control or non-ASCII characters."
            )

    def client(self) -> httpx.Client:
        """A client to ask with; close it."""
        import httpx

        key = self._key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(timeout=self.timeout_s, headers=headers)

    def ask(self, client: httpx.Client, messages: Sequence[Mapping[str, str]], max_tokens: int) -> str:
        """The reply to `messages` at temperature 0; "" where it has no text.

        Raises:
            Unavailable: no answer after all attempts.
            Refused: the endpoint refuses the request itself.
        """
        import httpx

        url = f"{self.url.rstrip('/')}/chat/completions"
        request = {
            "model": self.model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        problem = ""
        for attempt in range(self.retries + 1):
            asked_to_wait = None
            try:
                response = client.post(url, json=request)
                if response.status_code == 200:
                    return _content(response)
                problem = f"it said {response.status_code}: {self.hide(response.text)[:200]}"
                if response.status_code not in _AGAIN:
                    raise Refused(f"The {self.who} at {url} refuses the request; {problem}")
                asked_to_wait = response.headers.get("retry-after")
            except (httpx.HTTPError, _Garbled) as error:
                problem = f"{type(error).__name__.lstrip('_')}: {self.hide(str(error))[:200]}"
            if attempt < self.retries:
                self.pause(_pause(attempt, asked_to_wait))
        raise Unavailable(
            f"The {self.who} at {url} did not answer in {self.retries + 1} attempts ({problem}); {self.advice}."
        )

    def hide(self, text: str) -> str:
        """Return what a server or a library said, without the key."""
        key = self._key()
        return text.replace(key, "<key>") if key else text

    def _key(self) -> str:
        """The API key, "" where none is asked for; mounted secrets end with a line break."""
        return os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""


class _Garbled(Exception):
    """A reply is no chat completion."""


def require_plain_url(url: str, setting: str) -> None:
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
        raise UsageError(f"{setting.format('url')} is no http or https address.")
    if parts.userinfo or parts.query or parts.fragment:
        raise UsageError(
            f"{setting.format('url')} has a user, a query or a fragment, and it is recorded; put the key into an environment "
            f"variable and name that in {setting.format('api_key_env')}."
        )


def _content(response: httpx.Response) -> str:
    content: Any
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise _Garbled(f"the reply is no chat completion: {response.text}") from None
    return content if isinstance(content, str) else ""


def _pause(attempt: int, asked: str | None) -> float:
    """Seconds before the next attempt: what the server asks for, else doubled each time, with jitter."""
    if asked is not None and re.fullmatch(r"\d{1,4}", asked):
        return min(float(asked), _LONGEST_PAUSE)
    doubled: float = min(_FIRST_PAUSE * 2.0**attempt, _LONGEST_PAUSE)
    return doubled * random.uniform(0.5, 1.0)
