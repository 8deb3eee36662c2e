"""Text to token ids and back, through the `tokenizers` library: special-token strings inside a text stay plain text.

R runs of text, L tokens of a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer

from mmscale.errors import BadSampleError, ConfigError
from mmscale.registry import nearest
from mmscale.types import MEDIA_TOKENS, Modality

Place = Literal["start", "after_special", "inside"]
"""Where a run of text stands in the whole text: some tokenizers put a space in front of a text's first word."""


class TextTokenizer:
    """A Hugging Face tokenizer folder, as the data path needs it. Open one with `TextTokenizer.load`.

    `eos_id`, `pad_id` (the same id when the folder names no pad token) and `bos_id` (or None) are token ids.
    `prefix_ids` stand in front of every text, such as Llama's `<s>`. `num_tokens` counts the real vocabulary,
    `vocab_size` the padded one; ids from `num_tokens` on never occur. Equal `fingerprint`s give equal ids for any text.
    """

    def __init__(self, backend: Tokenizer, names: dict[str, str], fingerprint: str, pad_to_multiple: int) -> None:
        self._backend = backend
        self._names = names
        self._pad_to_multiple = pad_to_multiple
        self.fingerprint = fingerprint
        self._prepare()

    def _prepare(self) -> None:
        backend = self._backend
        probe = backend.encode("a")
        self.prefix_ids = tuple(
            i for i, _ in takewhile(lambda pair: pair[1], zip(probe.ids, probe.special_tokens_mask, strict=True))
        )
        backend.encode_special_tokens = True
        self._inner = _without_prefix_space(backend)
        self._prefixes_after_special = not _only_at_start(backend)
        self._special = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self.num_tokens = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.vocab_size = -(-self.num_tokens // self._pad_to_multiple) * self._pad_to_multiple
        self.eos_id = self.special_id(self._names["eos"])
        self.pad_id = self.special_id(self._names["pad"])
        self.bos_id = self.special_id(self._names["bos"]) if "bos" in self._names else None

    def __getstate__(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("_backend", "_names", "_pad_to_multiple", "fingerprint")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    @classmethod
    def load(cls, path: str | Path, add_tokens: Sequence[str] = (), pad_to_multiple: int = 64) -> TextTokenizer:
        """The tokenizer of a folder with `tokenizer.json` and `tokenizer_config.json`.

        Args:
            path: the folder.
            add_tokens: special tokens to add when they are missing, or to make special when they are ordinary tokens.
                `<image>`, `<video>` and `<audio>` are always added, after these.
            pad_to_multiple: `vocab_size` is rounded up to a multiple of this.

        Raises:
            ConfigError: a file is missing or malformed, or the end-of-text token is unknown.
        """
        folder = Path(path)
        text = _read_text(folder / "tokenizer.json")
        settings = _read_object(folder / "tokenizer_config.json")
        try:
            backend = Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(
                f"{folder / 'tokenizer.json'}: expected a tokenizer in the format of the `tokenizers` library, found: {error}; "
                "export the tokenizer again"
            ) from error
        backend.no_padding()
        backend.no_truncation()
        names = _named_tokens(settings, backend, folder / "tokenizer_config.json")
        wanted = [*names.values(), *add_tokens, *MEDIA_TOKENS.values()]
        backend.add_special_tokens(
            [AddedToken(t, special=True, normalized=False) for t in wanted if not _is_special(backend, t)]
        )
        identity = json.dumps([text, names, list(add_tokens)], ensure_ascii=True)
        return cls(backend, names, hashlib.sha256(identity.encode()).hexdigest()[:16], pad_to_multiple)

    def encode_batch(self, texts: Sequence[str], places: Sequence[Place] | None = None) -> list[list[int]]:
        """The ids of each text, without `prefix_ids`; special-token strings in a text are encoded as plain text.

        Args:
            texts: R runs of text.
            places: where each run stands in its whole text; None means that each run is a whole text.

        Raises:
            BadSampleError: `text_encoding`, a text holds a lone surrogate and so is no Unicode text.
        """
        if self._inner is self._backend or places is None:
            return self._encode(self._backend, texts)
        opens = [p == "start" or (p == "after_special" and self._prefixes_after_special) for p in places]
        first = iter(self._encode(self._backend, [t for t, o in zip(texts, opens, strict=True) if o]))
        later = iter(self._encode(self._inner, [t for t, o in zip(texts, opens, strict=True) if not o]))
        return [next(first) if o else next(later) for o in opens]

    def _encode(self, backend: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        try:
            return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError as error:
            for text in texts:
                _require_unicode(text)
            raise error

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`; `skip_special` leaves special tokens out."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def special_id(self, token: str) -> int:
        """The id of a special token. Raises ConfigError when the tokenizer has no such special token."""
        if token not in self._special:
            raise ConfigError(
                f"the special token '{token}' is expected in the tokenizer and not there; {nearest(token, self._special)}; "
                f"add it to model.tokenizer.add_tokens or choose another chat template"
            )
        return self._special[token]

    def media_id(self, modality: Modality) -> int:
        """The id of a modality's placeholder token."""
        return self._special[MEDIA_TOKENS[modality]]

    def save(self, folder: str | Path, chat_template: str | None = None) -> None:
        """Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` for `transformers.AutoTokenizer`.

        Args:
            folder: created when missing.
            chat_template: jinja text, see `mmscale.streaming.chat.to_jinja`; None writes none.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(target / "tokenizer.json"))
        settings: dict[str, Any] = {f"{role}_token": token for role, token in self._names.items()}
        settings |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "extra_special_tokens": {f"{modality}_token": token for modality, token in MEDIA_TOKENS.items()},
        }
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (target / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        if chat_template is not None:
            (target / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; model.tokenizer.path must name a tokenizer folder"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: expected UTF-8 text, found byte {error.start} that is not; export it again"
        ) from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected JSON, found: {error}; export the tokenizer again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}; export the tokenizer again")
    return value


def _named_tokens(settings: dict[str, Any], backend: Tokenizer, path: Path) -> dict[str, str]:
    """The texts of the eos, pad and (when there is one) bos token; eos is required, pad falls back to it."""
    names: dict[str, str] = {}
    for role in ("eos", "pad", "bos"):
        value = settings.get(f"{role}_token")
        token = value.get("content") if isinstance(value, dict) else value
        if token is None:
            continue
        if not isinstance(token, str) or backend.token_to_id(token) is None:
            raise ConfigError(
                f"{path}: {role}_token must be a token of tokenizer.json, found {token!r}; correct one of them"
            )
        names[role] = token
    if "eos" not in names:
        raise ConfigError(f"{path}: expected `eos_token` (the end-of-text token), found none; add it")
    return {"pad": names["eos"], **names}


def _is_special(backend: Tokenizer, token: str) -> bool:
    index = backend.token_to_id(token)
    known = backend.get_added_tokens_decoder().get(index) if index is not None else None
    return known is not None and known.special


def _require_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSampleError("text_encoding", f"character {error.start} of a text is a lone surrogate") from error


def _nodes(value: Any) -> list[dict[str, Any]]:
    """Every JSON object inside `value`, outermost first."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return ([value] if isinstance(value, dict) else []) + [node for child in children for node in _nodes(child)]


def _parts(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return _nodes(spec["normalizer"]) + _nodes(spec["pre_tokenizer"])


def _spec_without_vocabulary(backend: Tokenizer) -> dict[str, Any]:
    """Normalizer and pre-tokenizer as JSON values."""
    bare = Tokenizer(type(backend.model)())
    bare.normalizer, bare.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    return json.loads(bare.to_str())


def _only_at_start(backend: Tokenizer) -> bool:
    """Whether the space in front is put before the first word only, and not again after a special token."""
    return any(node.get("prepend_scheme") == "first" for node in _parts(_spec_without_vocabulary(backend)))


def _without_prefix_space(backend: Tokenizer) -> Tokenizer:
    """A tokenizer like `backend` that puts no space in front of a text; `backend` itself when it never does."""
    changed = False
    for node in _parts(_spec_without_vocabulary(backend)):
        changed |= node.get("type") == "Prepend" or node.get("prepend_scheme") in ("first", "always")
        changed |= node.get("add_prefix_space") is True
    if not changed:
        return backend
    spec = json.loads(backend.to_str())
    for node in _parts(spec):
        if node.get("type") == "Prepend":
            node["prepend"] = ""
        if "prepend_scheme" in node:
            node["prepend_scheme"] = "never"
        if "add_prefix_space" in node:
            node["add_prefix_space"] = False
    inner = Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    inner.encode_special_tokens = True
    return inner
