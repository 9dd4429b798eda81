"""Takes secrets out of whatever leaves the process: files, MLflow, terminal lines.

Two kinds are known: what an address says before its `@` or in a query field that is named like a secret, and the values of
environment variables that are named like secrets. Whoever writes something out calls `redact` on it at that place.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

HIDDEN = "***"
SHORTEST_SECRET = 6
"""Shorter values of environment variables are left alone: they are flags and numbers, and would be found everywhere."""

_NAME = r"(?:\w*TOKEN|\w*PASSWORD|\w*PASSWD|\w*SECRET|(?:\w*_)?API_?KEY|(?:\w*_)?ACCESS_?KEY|(?:\w*_)?PRIVATE_?KEY)"
# HF_TOKEN and AWS_ACCESS_KEY_ID; neither TOKENIZERS_PARALLELISM nor MAX_TOKENS, nor HF_TOKEN_PATH, which names a file.
_SECRET_NAME = re.compile(rf"{_NAME}(?:_\w+)?(?<!_PATH)(?<!_FILE)(?<!_DIR)", re.IGNORECASE)
# Up to the last @ before the path, as a password may hold one; a quote or a bracket ends the address.
_USER_INFO = re.compile(r"(?<=://)[^\s/?#\"'<>`]+(?=@)")
_QUERY_SECRET = re.compile(
    r"(?<=[?&;])((?:\w|-)*(?:token|password|passwd|pwd|secret|key|signature)=)[^\s&;#\"'<>`]+", re.IGNORECASE
)


def redact(value: Any, environment: Mapping[str, str] | None = None) -> Any:
    """The same without secrets: `http://user:password@host` becomes `http://***@host`, a token of the environment `***`.

    Args:
        value: a text; or dictionaries, lists and tuples, in which every text but the dictionaries' keys is redacted.
        environment: where to look for secrets (default: this process's environment).
    """
    return _redact(value, list(_secrets(os.environ if environment is None else environment)))


def has_user_info(uri: str) -> bool:
    """Whether an address carries a user name, password or token before its host."""
    return _USER_INFO.search(uri) is not None


def is_redacted(uri: str) -> bool:
    """Whether an address went through `redact`, so that its credentials are gone."""
    return HIDDEN in uri


def without_user_info(uri: str) -> str:
    """The address alone: `http://user:password@host` becomes `http://host`."""
    return re.sub(_USER_INFO.pattern + "@", "", uri)


def _redact(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, str):
        text = _QUERY_SECRET.sub(rf"\1{HIDDEN}", _USER_INFO.sub(HIDDEN, value))
        for secret in secrets:
            text = text.replace(secret, HIDDEN)
        return text
    if isinstance(value, dict):
        return {key: _redact(item, secrets) for key, item in value.items()}
    if isinstance(value, list):
        return [_redact(item, secrets) for item in value]
    return tuple(_redact(item, secrets) for item in value) if isinstance(value, tuple) else value


def _secrets(environment: Mapping[str, str]) -> Iterator[str]:
    """Secret values as they may be written, the longest first: one may hold another."""
    values = {value.strip() for name, value in environment.items() if _SECRET_NAME.fullmatch(name)}
    written = {form for value in values for form in (value, quote(value, safe=""), quote_plus(value), repr(value)[1:-1])}
    yield from sorted((form for form in written if len(form) >= SHORTEST_SECRET), key=len, reverse=True)
