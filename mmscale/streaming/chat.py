"""Conversations to token ids and an exact target mask: the assistant's answers plus the token(s) that end them.

A rendered conversation is cut at the template's special tokens, at media placeholders and at both borders of every
answer; each run of text between two cuts is encoded as a whole. So no token can straddle a border, and text that users
type never becomes a special token. L tokens of a conversation.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mmscale.config.load import read_yaml
from mmscale.errors import BadSampleError, ConfigError
from mmscale.registry import nearest
from mmscale.streaming.tokenizer import Place, TextTokenizer
from mmscale.types import MEDIA_TOKENS, MODALITIES, Modality, Turn

_FOLDER = Path(__file__).parents[1] / "configs" / "chat"
_TAG = re.compile(r"<(" + "|".join(MODALITIES) + r")>")
_TEXT = "{text}"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The text around the turns of a conversation; `{text}` marks where a turn's own text stands.

    A conversation is `begin`, then per turn `system`, `user`, or `assistant` + answer + `end` + `after`. `end` is a
    target, `after` is not. `last_end` replaces `end` when the answer closes the conversation. `default_system` is used
    when no system turn comes first. `user_text: media_only` drops the text of user turns and keeps their placeholders.
    A document has no turns: it is `begin`, its text with its media, and the end of a closing answer.
    `specials` are the strings in these texts that are special tokens.
    """

    name: str
    user: str
    assistant: str
    end: str
    begin: str = ""
    system: str = ""
    default_system: str | None = None
    last_end: str | None = None
    after: str = ""
    user_text: Literal["keep", "media_only"] = "keep"
    specials: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Equal for templates that render every conversation alike, whatever their names."""
        content = {k: v for k, v in asdict(self).items() if k != "name"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class ChatEncoding:
    """Token ids int64 [L], `is_target` bool [L] (this token is to be predicted), media slots in text order.

    A slot is (modality, index among the sample's items of that modality, first token).
    """

    input_ids: np.ndarray
    is_target: np.ndarray
    slots: tuple[tuple[Modality, int, int], ...] = field(default=())


def template_names() -> list[str]:
    """The names of the templates that come with mmscale."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_template(name_or_path: str | Path) -> ChatTemplate:
    """The chat template of a name in `configs/chat/`, or of a YAML file. Raises ConfigError saying what is wrong."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = _FOLDER / f"{name_or_path}.yaml"
        if str(name_or_path) not in template_names():
            raise ConfigError(
                f"unknown chat template '{name_or_path}'; {nearest(str(name_or_path), template_names())}; "
                f"give one of {', '.join(template_names())}, or the path of a .yaml file"
            )
    values = read_yaml(path)
    known = {f.name: f for f in fields(ChatTemplate) if f.name != "name"}
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}: unknown key '{key}' in a chat template; {nearest(key, known)}")
    for key, f in known.items():
        if f.default is MISSING and key not in values:
            raise ConfigError(f"{path}: '{key}' is required in a chat template and missing; add it")
    _check(values, path)
    values["specials"] = tuple(values.get("specials", ()))
    return ChatTemplate(name=path.stem, **values)


def _check(values: Mapping[str, Any], path: Path) -> None:
    """Raises ConfigError unless every value has its type and `{text}` stands where it may."""
    specials = values.get("specials", [])
    if not isinstance(specials, list) or not all(isinstance(s, str) and s for s in specials):
        raise ConfigError(f"{path}: specials must be a list of non-empty strings, found {specials!r}")
    if values.get("user_text", "keep") not in ("keep", "media_only"):
        raise ConfigError(f"{path}: user_text must be keep or media_only, found {values['user_text']!r}")
    texts = {k: v for k, v in values.items() if k not in ("specials", "user_text")}
    for key, text in texts.items():
        if text is None and key in ("default_system", "last_end"):
            continue
        if not isinstance(text, str):
            raise ConfigError(f"{path}: {key} must be text, found {text!r}; put it in quotes")
        least, most = {"user": (1, 1), "system": (0, 1)}.get(key, (0, 0))
        if not least <= text.count(_TEXT) <= most:
            raise ConfigError(f"{path}: {key} must hold {_TEXT} {most} time(s), found {text.count(_TEXT)} time(s)")
    if not values["end"] or values.get("last_end") == "":
        raise ConfigError(f"{path}: the end of a turn must not be empty; nothing would tell the model to stop")
    for special in specials:
        if not any(special in text for text in texts.values() if text):
            raise ConfigError(f"{path}: the special token '{special}' occurs in no text of the template; remove it")


class _Piece(NamedTuple):
    """A run of text, one special token (`kind` special), or one media item (`kind` is its modality)."""

    kind: str
    text: str
    is_target: bool


@lru_cache(maxsize=1024)
def _cut(text: str, specials: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """`text` of a template as (kind, text) pairs, cut at its special tokens; the longest match wins."""
    if not specials:
        return (("text", text),)
    pattern = "|".join(re.escape(s) for s in sorted(specials, key=len, reverse=True))
    parts = re.split(f"({pattern})", text)
    return tuple(("special" if i % 2 else "text", part) for i, part in enumerate(parts) if part)


class _Rendering:
    """Pieces of one conversation. Neighbouring texts become one run, except at the borders of answers."""

    def __init__(self, template: ChatTemplate) -> None:
        self.pieces: list[_Piece] = []
        self._template = template

    def add(self, kind: str, text: str, is_target: bool = False) -> None:
        """Appends a piece; joins it to the text before unless one of the two is a target."""
        if not text:
            return
        last = self.pieces[-1] if self.pieces else None
        if last and kind == last.kind == "text" and not is_target and not last.is_target:
            self.pieces[-1] = _Piece("text", last.text + text, False)
        else:
            self.pieces.append(_Piece(kind, text, is_target))

    def fixed(self, text: str, is_target: bool = False) -> None:
        """Appends a text of the template, in which special tokens count."""
        for kind, part in _cut(text, self._template.specials):
            self.add(kind, part, is_target)

    def user(self, text: str, modalities: Collection[Modality]) -> None:
        """Appends a user's text; tags of the given modalities are media, all else is plain."""
        for kind, part in _split_media(text, modalities):
            if kind != "text" or self._template.user_text == "keep":
                self.add(kind, part)

    def document(self, text: str, modalities: Collection[Modality]) -> None:
        """Appends a document: its words are targets, its media are not."""
        for kind, part in _split_media(text, modalities):
            self.add(kind, part, is_target=kind == "text")


def _split_media(text: str, modalities: Collection[Modality]) -> Iterator[tuple[str, str]]:
    """(kind, text) of a text's runs and of its tags of the given modalities; other tags are plain text."""
    run = ""
    for i, part in enumerate(_TAG.split(text)):
        if i % 2 == 0:
            run += part
        elif part in modalities:
            yield "text", run
            yield part, MEDIA_TOKENS[part]  # type: ignore[index]
            run = ""
        else:
            run += f"<{part}>"
    yield "text", run


def _render(
    template: ChatTemplate, turns: Sequence[Turn], modalities: Collection[Modality], generation_prompt: bool
) -> list[_Piece]:
    """The pieces of a conversation, in order."""
    if generation_prompt and turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    is_document = bool(turns) and turns[0].role == "document"
    if template.default_system is not None and not is_document and (not turns or turns[0].role != "system"):
        turns = [Turn("system", template.default_system), *turns]
    out = _Rendering(template)
    out.fixed(template.begin)
    if is_document:
        out.document(turns[0].text, modalities)
        if not generation_prompt:
            out.fixed(template.last_end or template.end, is_target=True)
        return out.pieces
    for i, turn in enumerate(turns):
        if turn.role == "assistant":
            closes = i == len(turns) - 1 and not generation_prompt
            out.fixed(template.assistant)
            out.add("text", turn.text, is_target=True)
            out.fixed(template.last_end if closes and template.last_end else template.end, is_target=True)
            out.fixed(template.after)
            continue
        before, mark, behind = (template.user if turn.role == "user" else template.system).partition(_TEXT)
        out.fixed(before)
        if mark:
            out.user(turn.text, modalities) if turn.role == "user" else out.add("text", turn.text)
        out.fixed(behind)
    if generation_prompt:
        out.fixed(template.assistant)
    return out.pieces


def _places(pieces: Sequence[_Piece]) -> Iterable[Place]:
    """The place of each text piece."""
    previous: Place = "start"
    for piece in pieces:
        if piece.kind == "text":
            yield previous
        previous = "inside" if piece.kind == "text" else "after_special"


def _prefix(template_start: Sequence[_Piece], tokenizer: TextTokenizer) -> tuple[int, ...]:
    """The tokenizer's own prefix, unless the template already begins with it."""
    prefix = tokenizer.prefix_ids
    first = template_start[0] if template_start else None
    if prefix and first is not None and first.kind == "special" and tokenizer.special_id(first.text) == prefix[0]:
        return ()
    return prefix


def _encode_texts(tokenizer: TextTokenizer, conversations: Sequence[Sequence[_Piece]]) -> list[list[int]]:
    """The ids of all text pieces of all conversations, in one call of the tokenizer."""
    texts = [p.text for pieces in conversations for p in pieces if p.kind == "text"]
    return tokenizer.encode_batch(texts, list(chain.from_iterable(_places(pieces) for pieces in conversations)))


def encode_chat(
    template: ChatTemplate,
    tokenizer: TextTokenizer,
    turns: Sequence[Turn],
    media_tokens: Mapping[Modality, Sequence[int]],
    *,
    generation_prompt: bool = False,
) -> ChatEncoding:
    """Token ids, target mask and media slots of one conversation.

    Args:
        template: the chat template.
        tokenizer: knows the template's special tokens.
        turns: the conversation, or one document. Placeholders count in user turns and documents only.
        media_tokens: per modality, the number of tokens of each item in order. Tags of a modality without items are
            plain text.
        generation_prompt: leave out a closing assistant turn and end where its answer would start.

    Raises:
        BadSampleError: `media_count`, placeholders and items differ in number; `text_encoding`, a text is no Unicode.
        ConfigError: the tokenizer lacks a special token of the template.
    """
    present = [m for m in MODALITIES if media_tokens.get(m)]
    pieces = _render(template, turns, present, generation_prompt)
    for modality in present:
        tags, items = sum(p.kind == modality for p in pieces), len(media_tokens[modality])
        if tags != items:
            raise BadSampleError(
                "media_count", f"{tags} {MEDIA_TOKENS[modality]} placeholders for {items} {modality} items"
            )
    runs = [list(_prefix(pieces, tokenizer)), *_token_runs(tokenizer, pieces, media_tokens)]
    lengths = np.fromiter(map(len, runs), np.int64, len(runs))
    flags = np.array([False, *(p.is_target for p in pieces)], np.bool_)
    starts = (np.cumsum(lengths) - lengths)[1:]
    return ChatEncoding(
        input_ids=np.fromiter(chain.from_iterable(runs), np.int64, int(lengths.sum())),
        is_target=np.repeat(flags, lengths),
        slots=_slots(pieces, starts),
    )


def _token_runs(
    tokenizer: TextTokenizer, pieces: Sequence[_Piece], media_tokens: Mapping[Modality, Sequence[int]]
) -> Iterable[list[int]]:
    """The ids of each piece; a media item is its placeholder's id once per token."""
    text_ids = iter(_encode_texts(tokenizer, [pieces]))
    counts = {modality: iter(items) for modality, items in media_tokens.items()}
    for piece in pieces:
        if piece.kind == "text":
            yield next(text_ids)
        elif piece.kind == "special":
            yield [tokenizer.special_id(piece.text)]
        else:
            modality: Modality = piece.kind  # type: ignore[assignment]
            yield [tokenizer.media_id(modality)] * next(counts[modality])


def _slots(pieces: Sequence[_Piece], starts: np.ndarray) -> tuple[tuple[Modality, int, int], ...]:
    seen = dict.fromkeys(MODALITIES, 0)
    slots: list[tuple[Modality, int, int]] = []
    for piece, start in zip(pieces, starts.tolist(), strict=True):
        if piece.kind in MEDIA_TOKENS:
            modality: Modality = piece.kind  # type: ignore[assignment]
            slots.append((modality, seen[modality], start))
            seen[modality] += 1
    return tuple(slots)


def count_text_tokens(
    template: ChatTemplate, tokenizer: TextTokenizer, rows: Sequence[tuple[Sequence[Turn], Collection[Modality]]]
) -> np.ndarray:
    """Tokens of each conversation without its media tokens, int64 [rows], in one call of the tokenizer.

    With the media tokens added it is the length that `encode_chat` gives.

    Args:
        template: the chat template.
        tokenizer: the tokenizer.
        rows: per conversation its turns and the modalities of its media.
    """
    conversations = [_render(template, turns, modalities, False) for turns, modalities in rows]
    ids = iter(_encode_texts(tokenizer, conversations))
    counts = []
    for pieces in conversations:
        tokens = {"text": 0, "special": 0}
        for piece in pieces:
            if piece.kind in tokens:
                tokens[piece.kind] += len(next(ids)) if piece.kind == "text" else 1
        counts.append(len(_prefix(pieces, tokenizer)) + sum(tokens.values()))
    return np.array(counts, np.int64)


def stop_ids(template: ChatTemplate, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Ids at which generation stops: the tokenizer's end of text, and the template's ends of an answer of one token."""
    ids = [tokenizer.eos_id]
    for end in filter(None, (template.end, template.last_end)):
        (kind, text), *_ = _cut(end, template.specials)
        encoded = [tokenizer.special_id(text)] if kind == "special" else tokenizer.encode_batch([text], ["inside"])[0]
        ids += encoded if len(encoded) == 1 else []
    return tuple(dict.fromkeys(ids))


def _quote(text: str) -> str:
    """A jinja string literal."""
    return json.dumps(text, ensure_ascii=False)


def _around(text: str, inner: str) -> str:
    """A jinja expression for a turn's text of the template with the expression `inner` in its place."""
    before, mark, behind = text.partition(_TEXT)
    return f"{_quote(before)} ~ {inner} ~ {_quote(behind)}" if mark else _quote(before)


def _jinja_content(user_text: str) -> str:
    """A jinja macro `text_of(content)` for a user's content: a string, or a list of media and text parts."""
    tags = "".join(f"{{% if part.startswith('{m}>') %}}<{m}>{{% endif %}}" for m in MODALITIES)
    if user_text == "media_only":
        string = "{% for part in content.split('<') %}{% if not loop.first %}" + tags + "{% endif %}{% endfor %}"
        text = newline = ""
    else:
        string = "{{ content }}"
        text = "{% set state.leads = false %}{{ part['text'] }}"
        newline = (
            "{% if state.leads and not loop.last and not (loop.nextitem['type'] == 'text' "
            "and loop.nextitem['text'][:1] in (' ', '\\t', '\\n')) %}{{ '\\n' }}{% endif %}"
        )
    return (
        "{% macro text_of(content) %}{% if content is string %}" + string + "{% else %}"
        "{% set state = namespace(leads=true) %}{% for part in content %}"
        "{% if part['type'] == 'text' %}" + text + "{% else %}{{ '<' ~ part['type'] ~ '>' }}" + newline + "{% endif %}"
        "{% endfor %}{% endif %}{% endmacro %}"
    )


def to_jinja(template: ChatTemplate) -> str:
    """The same template in the jinja form that `transformers` takes, made from the same data.

    `content` of a message is a string, or a list of `{"type": "image"}` and `{"type": "text", "text": ...}` parts
    (`video` and `audio` likewise). In a list, media in front of a turn's text get a newline behind them, unless the
    text begins with white space; media behind text stand as they are.
    """
    end = _quote(template.end)
    if template.last_end:
        end = f"({_quote(template.last_end)} if loop.last and not add_generation_prompt else {end})"
    plain = (
        "(message['content'] if message['content'] is string else message['content'] | map(attribute='text') | join)"
    )
    parts = [_jinja_content(template.user_text), f"{{{{ {_quote(template.begin)} }}}}"]
    if template.default_system is not None:
        default = _around(template.system, _quote(template.default_system))
        parts.append(f"{{% if not messages or messages[0]['role'] != 'system' %}}{{{{ {default} }}}}{{% endif %}}")
    parts += [
        "{% for message in messages %}{% if message['role'] == 'system' %}",
        f"{{{{ {_around(template.system, plain)} }}}}",
        "{% elif message['role'] == 'user' %}",
        "{{ " + _around(template.user, "text_of(message['content'])") + " }}",
        "{% elif message['role'] == 'assistant' %}",
        f"{{{{ {_quote(template.assistant)} ~ {plain} ~ {end} ~ {_quote(template.after)} }}}}",
        "{% else %}{{ raise_exception('roles are system, user and assistant, found ' ~ message['role']) }}{% endif %}{% endfor %}",
        f"{{% if add_generation_prompt %}}{{{{ {_quote(template.assistant)} }}}}{{% endif %}}",
    ]
    return "".join(parts)
