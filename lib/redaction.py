"""Removes passwords, keys and signatures of URLs from everything that a job prints."""

import re
from collections.abc import Sequence
from typing import Any, TextIO
from urllib.parse import urlsplit


def redacted(text: str) -> str:
    """Return a URL, or a text with URLs in it, without passwords, keys and signatures: fit for a log."""
    if "://" not in text:
        return text
    without_password = re.sub(r"://\S*:\S*@|(?<=http)://[^\s/?#]+@|(?<=https)://[^\s/?#]+@", "://***@", text)
    # Punctuation after the URL, in a sentence or in JSON, stays.
    return re.sub(r"""(://[^?\s]*)\?\S*=\S*?(?=[\\"'`),.:;\]}>]*(?:\s|$))""", r"\1?***", without_password)


def shown(url: str) -> str:
    """Return a URL for a message: quoted, on one line, without secrets."""
    return repr(redacted(url))


class StreamWithoutSecrets:
    """A text stream that removes passwords, keys and signatures of URLs.

    Everything that a job prints passes through it: messages, logs, tracebacks, lines of Ray's workers, the result.
    """

    def __init__(self, stream: TextIO, given: Sequence[str]) -> None:
        """Write to `stream`; secrets of the URLs in `given` are removed even outside of their URL."""
        self._stream = stream
        self._secrets = [secret for text in given for secret in _secrets_of(text)]

    def write(self, text: str) -> int:
        self._stream.write(self._safe(text))
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def _safe(self, text: str) -> str:
        safe = redacted(text)
        for secret in self._secrets:
            safe = safe.replace(secret, "***")
        return safe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _secrets_of(text: str) -> list[str]:
    """Return the secret parts of a URL that a storage may repeat: user and password, and the query."""
    scheme, mark, rest = text.partition("://")
    if not mark:
        return []
    login = rest[: rest.rfind("@") + 1]
    query = urlsplit(f"{scheme}://{rest}").query
    return [each for each in (login if ":" in login else "", query if "=" in query else "") if each]
