"""The tokenizer's special tokens, padding of the vocabulary, refusals and copies; and that `transformers` agrees with it."""

from __future__ import annotations

import json
import pickle

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mmscale.errors import BadSampleError, ConfigError
from mmscale.streaming.chat import encode_chat, load_template, template_names, to_jinja
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import Turn

SPECIALS = [
    "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<eos>", "<|begin_of_text|>", "<|end_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip
CORPUS = ["the cat and the dog, 12 apples.\nUSER: What? ASSISTANT: A cat system assistant user\n\n helpful"] * 8
MEDIA = ["<image>", "<video>", "<audio>"]


def byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def unigram(scheme: str) -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    letters = sorted(set("".join(CORPUS)) | set("▁'NIVabcdefghijklmnopqrstuvwxyzACHTUY"))
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", initial_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def prepended() -> Tokenizer:
    """Llama 2's older layout: the space is put in front by the normalizer."""
    letters = sorted(set("".join(CORPUS)) - {" "} | set("▁'NIVabcdefghijklmnopqrstuvwxyzACHTUY\n"))
    backend = Tokenizer(
        models.BPE({c: i for i, c in enumerate([*letters, "▁A", "▁t", "ca"])}, [("▁", "A"), ("▁", "t"), ("c", "a")])
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return backend


BACKENDS = {
    "bytes": byte_level, "metaspace_first": lambda: unigram("first"), "metaspace_always": lambda: unigram("always"),
    "metaspace_never": lambda: unigram("never"), "prepend": prepended,
}  # fmt: skip


def write(folder, backend: Tokenizer, bos: bool = False, **config):
    folder.mkdir(exist_ok=True)
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIALS])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
        config["bos_token"] = "<s>"
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", **config}))
    return folder


def test_adds_what_is_missing_and_pads_the_vocabulary(tmp_path):
    folder = write(tmp_path, byte_level())
    tokenizer = TextTokenizer.load(folder, add_tokens=["<|extra|>", "</s>"], pad_to_multiple=64)
    base = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    assert [tokenizer.special_id(t) for t in ("<|extra|>", *MEDIA)] == [base, base + 1, base + 2, base + 3]
    assert tokenizer.num_tokens == base + 4
    assert tokenizer.vocab_size % 64 == 0 and 0 <= tokenizer.vocab_size - tokenizer.num_tokens < 64
    assert tokenizer.pad_id == tokenizer.eos_id == tokenizer.special_id("<|endoftext|>")
    assert tokenizer.bos_id is None and tokenizer.prefix_ids == ()
    with pytest.raises(ConfigError, match=r"<\|im_strat\|>.*did you mean '<\|im_start\|>'.*model.tokenizer.add_tokens"):
        tokenizer.special_id("<|im_strat|>")


def test_special_strings_are_plain_text_and_ordinary_added_tokens_can_be_made_special(tmp_path):
    backend = byte_level()
    backend.add_tokens(["<tool>"])
    folder = write(tmp_path, backend)
    plain, special = TextTokenizer.load(folder), TextTokenizer.load(folder, add_tokens=["<tool>"])
    with pytest.raises(ConfigError, match="<tool>"):
        plain.special_id("<tool>")
    assert special.special_id("<tool>") in plain.encode_batch(["a <tool>"])[0]
    for text in ["a <tool>", "<|im_end|>", "x<image>y"]:
        (ids,) = special.encode_batch([text])
        assert special.decode(ids) == text and max(ids) < special.special_id("<tool>")
    assert special.decode([special.eos_id, *ids], skip_special=True) == "x<image>y"


def test_copies_and_reloads_agree(tmp_path):
    texts = ["the cat <|im_end|>", "", " A\n"]
    places = ["start", "inside", "after_special"]
    for name, make in BACKENDS.items():
        tokenizer = TextTokenizer.load(write(tmp_path / name, make(), bos=True), add_tokens=["<|extra|>"])
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.encode_batch(texts, places) == tokenizer.encode_batch(texts, places)
        assert copy.prefix_ids == tokenizer.prefix_ids == (tokenizer.bos_id,)
        same = TextTokenizer.load(tmp_path / name, add_tokens=["<|extra|>"])
        other = TextTokenizer.load(tmp_path / name)
        assert copy.fingerprint == same.fingerprint == tokenizer.fingerprint != other.fingerprint
        assert (copy.vocab_size, copy.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", "{", "expected a tokenizer"),
        ("tokenizer.json", "[]", "expected a tokenizer"),
        ("tokenizer.json", None, "cannot read"),
        ("tokenizer_config.json", None, "cannot read"),
        ("tokenizer_config.json", "{", "expected JSON"),
        ("tokenizer_config.json", "[]", "expected a JSON object"),
        ("tokenizer_config.json", "{}", "expected `eos_token`"),
        ("tokenizer_config.json", '{"eos_token": "<nowhere>"}', "must be a token of tokenizer.json"),
        ("tokenizer_config.json", '{"eos_token": {"content": 3}}', "must be a token of tokenizer.json"),
        ("tokenizer_config.json", b"\xff", "expected UTF-8"),
    ],
)
def test_damaged_folders_are_refused_by_name(file, text, message, tmp_path):
    folder = write(tmp_path, byte_level())
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        TextTokenizer.load(folder)
    assert file in str(caught.value)


def test_no_unicode_is_a_counted_skip(tmp_path):
    tokenizer = TextTokenizer.load(write(tmp_path, byte_level()))
    with pytest.raises(BadSampleError) as caught:
        tokenizer.encode_batch(["fine", "a\udcff"])
    assert caught.value.reason == "text_encoding"


TURNS = [
    Turn("system", "the dog."), Turn("user", "<image>\nWhat?\n"), Turn("assistant", "A cat"), Turn("user", " the <image> and <image>"),
    Turn("assistant", ""), Turn("user", "12 apples?"), Turn("assistant", "the"),
]  # fmt: skip


def as_messages(turns, parts: bool):
    """Messages for `transformers`; `parts` cuts user texts at their placeholders."""
    messages = []
    for turn in turns:
        content = turn.text
        if parts and turn.role == "user":
            texts = turn.text.split("<image>")
            content = [{"type": "text", "text": texts[0]}] if texts[0] else []
            for text in texts[1:]:
                content += [{"type": "image"}, *([{"type": "text", "text": text}] if text else [])]
        messages.append({"role": turn.role, "content": content})
    return messages


@pytest.mark.parametrize("name", template_names())
def test_jinja_form_renders_the_same_text_as_the_data(name, tmp_path):
    from transformers import AutoTokenizer

    template = load_template(name)
    tokenizer = TextTokenizer.load(write(tmp_path / "in", byte_level()))
    tokenizer.save(tmp_path / "out", to_jinja(template))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for start, stop, prompt in [(0, 7, False), (1, 7, False), (0, 6, True), (1, 2, True), (0, 3, False), (2, 3, False)]:
        turns = TURNS[start:stop]
        images = sum(t.text.count("<image>") for t in turns if t.role == "user")
        ours = encode_chat(template, tokenizer, turns, {"image": [1] * images}, generation_prompt=prompt)
        for parts in (False, True):
            text = theirs.apply_chat_template(as_messages(turns, parts), tokenize=False, add_generation_prompt=prompt)
            assert text == tokenizer.decode(ours.input_ids.tolist()), (turns, parts)


def test_jinja_form_quotes_whatever_a_template_holds(tmp_path):
    from transformers import AutoTokenizer

    path = tmp_path / "nasty.yaml"
    nasty = "\"'\\ {{ x }} {% y %} {# z #} %s é\n"
    fields = {
        "user": nasty + "{text}" + nasty,
        "system": nasty + "{text}",
        "default_system": nasty,
        "assistant": nasty,
        "end": nasty,
    }
    path.write_text(json.dumps(fields))
    template = load_template(path)
    tokenizer = TextTokenizer.load(write(tmp_path / "in", byte_level()))
    tokenizer.save(tmp_path / "out", to_jinja(template))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for turns in (TURNS[1:3], TURNS[4:5], [Turn("user", nasty), Turn("assistant", nasty)]):
        images = sum(t.text.count("<image>") for t in turns)
        ours = tokenizer.decode(encode_chat(template, tokenizer, turns, {"image": [1] * images}).input_ids.tolist())
        assert theirs.apply_chat_template(as_messages(turns, False), tokenize=False) == ours
        assert nasty in ours


def test_media_in_front_of_a_text_get_a_newline(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = TextTokenizer.load(write(tmp_path / "in", byte_level()))
    tokenizer.save(tmp_path / "out", to_jinja(load_template("vicuna_v1")))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    image, audio = {"type": "image"}, {"type": "audio"}
    cases = {
        "<image>\nQ": [image, {"type": "text", "text": "Q"}],
        "<image>\n<audio>\nQ": [image, audio, {"type": "text", "text": "Q"}],
        "<image>\nQ ": [image, {"type": "text", "text": "\nQ "}],
        "A <image>: B": [{"type": "text", "text": "A "}, image, {"type": "text", "text": ": B"}],
        "<image>": [image],
    }
    for text, content in cases.items():
        rendered = theirs.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        assert rendered.endswith(f" USER: {text} "), text


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", BACKENDS)
def test_transformers_gives_the_same_ids_for_a_prompt(kind, bos, tmp_path):
    """Holds for every prompt without earlier answers. With earlier answers it holds where the whole text's tokens do not
    depend on what lies behind an answer's border, as in byte-level chatml."""
    from transformers import AutoTokenizer

    tokenizer = TextTokenizer.load(write(tmp_path / "in", BACKENDS[kind](), bos=bos))
    tokenizer.save(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.convert_tokens_to_ids([*SPECIALS, *MEDIA]) == [tokenizer.special_id(t) for t in [*SPECIALS, *MEDIA]]
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.image_token) == (
        tokenizer.eos_id,
        tokenizer.pad_id,
        "<image>",
    )
    for name in template_names():
        jinja = to_jinja(load_template(name))
        for turns in ([TURNS[1]], TURNS[:2], [Turn("user", "the <image> and"), *TURNS[2:4]]):
            if len(turns) == 3 and not (kind == "bytes" and name in ("chatml", "qwen2")):
                continue
            images = sum(t.text.count("<image>") for t in turns)
            ours = encode_chat(load_template(name), tokenizer, turns, {"image": [1] * images}, generation_prompt=True)
            text = theirs.apply_chat_template(
                as_messages(turns, False), chat_template=jinja, tokenize=False, add_generation_prompt=True
            )
            assert theirs(text)["input_ids"] == ours.input_ids.tolist(), (name, text)


def test_the_saved_folder_opens_to_the_same_tokenizer(tmp_path):
    tokenizer = TextTokenizer.load(write(tmp_path / "in", byte_level(), bos=True), add_tokens=["<|extra|>"])
    tokenizer.save(tmp_path / "out")
    again = TextTokenizer.load(tmp_path / "out")
    texts = ["the cat", "<|im_end|> é🙂", ""]
    assert again.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert (again.eos_id, again.bos_id, again.num_tokens) == (tokenizer.eos_id, tokenizer.bos_id, tokenizer.num_tokens)
    assert again.special_id("<|extra|>") == tokenizer.special_id("<|extra|>")
