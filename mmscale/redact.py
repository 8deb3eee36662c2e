"""Takes secrets out of every text that leaves the process: log lines, errors, records, stored configs.

Three rules, one function `redact`:
  - a URL loses its user, password, query and fragment;
  - what follows the name of a secret goes: `HF_TOKEN=...`, `Authorization: Bearer ...`, `--password ...`, `-u name:...`;
  - a value that `hide` was told goes wherever it stands: those of the environment, and those found in the config.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote

HIDDEN = "***"
"""Stands in the place of what was taken out."""

MIN_CHARS = 6
"""Shorter values are not looked for: they would be found in the middle of innocent words."""

_LONG_CHARS = 16
"""A query value of this length is taken for a secret whatever its name."""

_STRONG = re.compile(r"secret|passw(or)?d|passphrase|credential|authorization|signature|api_?key|jwt")
_HINTS = (
    "token",
    "secret",
    "passw",
    "passphrase",
    "credential",
    "authorization",
    "signature",
    "key",
    "jwt",
    "sig",
    "pwd",
)
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z0-9]+")
_VOCABULARY = frozenset(
    [
        "bos",
        "eos",
        "pad",
        "unk",
        "sep",
        "cls",
        "mask",
        "start",
        "end",
        "decoder",
        "image",
        "video",
        "audio",
        "newline",
        "special",
        "add",
        "max",
        "min",
        "num",
        "per",
        "new",
        "next",
    ]
)
"""Words before `token` that speak of a tokenizer's tokens."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{1,20}://[^\s\"'<>]+")
_VALUE = r"(\"[^\"]*\"|'[^']*'|[^\s,;&\"'})\]]+)"
_NAMED = re.compile(
    rf"(?<![\w-])([A-Za-z_][\w-]{{0,60}})(['\"]?\s?[:=]\s?)((?:(?:basic|bearer|token|digest)\s+)?){_VALUE}", re.I
)
_OPTION = re.compile(rf"(?<!\S)(--([A-Za-z][\w-]{{0,60}}))(\s+){_VALUE}")
_LOGIN = re.compile(r"(?<!\S)((?:-u|--user)[\s=]+)(['\"]?[^\s:'\"]+:)[^\s'\"]+")

_hidden: set[str] = set()
_found: re.Pattern[str] | None = None


def is_secret_name(name: str) -> bool:
    """Whether a variable, key or option of this name holds a secret.

    Example:
        >>> [is_secret_name(n) for n in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "pad_token", "tokenizer", "max_tokens", "key")]
        [True, True, False, False, False, False]
    """
    words = [word.lower() for word in _WORD.findall(name)]
    if _STRONG.search("_".join(words)) or _STRONG.search("".join(words)):
        return True
    if words and words[-1] == "id":  # AWS_ACCESS_KEY_ID, but neither pad_token_id nor a bare id
        words.pop()
    if not words:
        return False
    before = words[-2] if len(words) > 1 else ""
    if words[-1].endswith("token"):
        return before not in _VOCABULARY
    return words[-1] in ("sig", "pwd") or (words[-1] == "key" and before != "")


def bare_url(url: str) -> str:
    """A URL without user, password, query and fragment; any other text as it is.

    Example:
        >>> bare_url("https://me:pw@host/a.tar?sig=x"), bare_url("a/b?c")
        ('https://host/a.tar', 'a/b?c')
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    place = re.split(r"[?#]", rest, maxsplit=1)[0]
    host, slash, path = place.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def redact(text: str) -> str:
    """`text` with `***` in the place of every secret.

    Example:
        >>> redact("HF_TOKEN=hf_abc: GET https://me:pw@host/a.tar?sig=x fails")
        'HF_TOKEN=*** GET https://***@host/a.tar?*** fails'
    """
    if _found is not None:
        text = _found.sub(HIDDEN, text)
    if "://" in text:
        text = _URL.sub(_marked_url, text)
    lowered = text.lower()
    if any(hint in lowered for hint in _HINTS):  # 30 times cheaper than the patterns on a line of the ledger
        text = _OPTION.sub(_marked_option, _NAMED.sub(_marked_value, text))
    if "-u" in text:
        text = _LOGIN.sub(rf"\1\2{HIDDEN}", text)
    return text


def redact_values(value: Any) -> Any:
    """A copy of plain values (mappings, sequences, texts, numbers) whose texts are redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redact_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact_values(item) for item in value]
    return value


def hidden_keys(value: Any, prefix: str = "") -> list[str]:
    """The dotted keys of plain values under which something was taken out.

    Example:
        >>> hidden_keys({"data": {"root": "https://host/a?***", "seed": 0}})
        ['data.root']
    """
    if isinstance(value, Mapping):
        pairs: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, (list, tuple)):
        pairs = enumerate(value)
    else:
        return [prefix] if isinstance(value, str) and HIDDEN in value else []
    return [key for name, item in pairs for key in hidden_keys(item, f"{prefix}.{name}" if prefix else str(name))]


def hide(values: Iterable[str]) -> None:
    """From now on `redact` takes these values out wherever they stand, as they are or quoted for JSON or a URL."""
    global _found
    for value in values:
        if len(value.strip()) >= MIN_CHARS and value != HIDDEN:
            forms = (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1])
            _hidden.update((*forms, quote(value), quote(value, safe=""), quote_plus(value)))
    if _hidden:
        _found = re.compile("|".join(re.escape(one) for one in sorted(_hidden, key=len, reverse=True)))


def find_secrets(value: Any, name: str = "") -> Iterator[str]:
    """The secrets in plain values: in URLs, in commands, and texts under the name of a secret.

    Args:
        value: mappings, sequences, texts, numbers.
        name: the key under which it stands.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from find_secrets(item, str(key))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from find_secrets(item, name)
    elif isinstance(value, str):
        if is_secret_name(name):
            yield value
        if value.startswith("pipe:"):  # a command may hold secrets in any form
            yield value.removeprefix("pipe:").strip()
        for url in _URL.findall(value):
            yield from _secrets_of_url(url)
        for match in (*_NAMED.finditer(value), *_OPTION.finditer(value)):
            if is_secret_name(match[1]):
                yield match[4].strip("\"'")


def _secrets_of_url(url: str) -> Iterator[str]:
    place, _, query = url.partition("://")[2].partition("#")[0].partition("?")
    login = place.partition("/")[0].rpartition("@")[0]
    password = login.partition(":")[2] or login
    yield from (password, unquote(password))
    for name, value in parse_qsl(query):
        if is_secret_name(name) or len(value) >= _LONG_CHARS:
            yield value


def _marked_url(match: re.Match[str]) -> str:
    url = match[0]
    bare = bare_url(url)
    if bare == url:
        return url
    scheme, _, rest = url.partition("://")
    login = f"{HIDDEN}@" if "@" in re.split(r"[/?#]", rest, maxsplit=1)[0] else ""
    query = f"?{HIDDEN}" if re.search(r"[?#]", rest) else ""
    return f"{scheme}://{login}{bare.partition('://')[2]}{query}"


def _marked_value(match: re.Match[str]) -> str:
    name, separator, scheme, _ = match.groups()
    is_plain_word = ":" in separator and name.lower() == "token"  # "unknown token: x" is a sentence
    if is_plain_word or not is_secret_name(name):
        return match[0]
    return f"{name}{separator}{scheme}{HIDDEN}"


def _marked_option(match: re.Match[str]) -> str:
    return f"{match[1]}{match[3]}{HIDDEN}" if is_secret_name(match[2]) else match[0]
