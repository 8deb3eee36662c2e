"""Chat templates and label masks against renderings written out here and an oracle of character positions.

The oracle shares nothing with the code: it writes the conversation as plain strings, maps every id back to its bytes, and
asks that the bytes join to the whole text, that a token is a target exactly when all its bytes are answer or end of turn,
and that special ids stand exactly where the template writes a special token.
"""

from __future__ import annotations

import json
import random
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mmscale.errors import BadSampleError, ConfigError
from mmscale.streaming.chat import count_text_tokens, encode_chat, load_template, stop_ids, template_names
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import Turn

SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "</s>", "<eos>", "<|begin_of_text|>", "<|end_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip
MEDIA = ("image", "video", "audio")
VICUNA = (
    "A chat between a curious {} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
)
HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
CORPUS = [
    "A chat between a curious user and an assistant. USER: What is this? ASSISTANT: A cat.",
    "You are a helpful assistant\nsystem user assistant the the there then, 12 345 apples\n\n  and more",
] * 8


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("bytes")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIALS])
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return TextTokenizer.load(folder)


def byte_of_letter() -> dict[str, int]:
    """The published byte-to-letter table of byte-level BPE, inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


LETTERS = byte_of_letter()


def piece_bytes(tokenizer: TextTokenizer, token_id: int) -> tuple[bytes, bool]:
    """The bytes of one id, and whether it is a special token."""
    token = tokenizer._backend.id_to_token(token_id)
    if token in SPECIALS or token in [f"<{m}>" for m in MEDIA]:
        return token.encode(), True
    return bytes(LETTERS[c] for c in token), False


def spaced_bytes(tokenizer: TextTokenizer, token_id: int) -> tuple[bytes, bool]:
    """The same for a tokenizer in which spaces are letters."""
    token = tokenizer._backend.id_to_token(token_id)
    is_special = token in SPECIALS or token in [f"<{m}>" for m in MEDIA]
    return (token if is_special else token.replace("▁", " ")).encode(), is_special


def user_atoms(text: str, counts: dict[str, list[int]], drop_text: bool) -> list[tuple[str, bool, bool]]:
    """A user's text as atoms (text, is_special, is_target), a placeholder repeated once per token."""
    left = {m: list(n) for m, n in counts.items()}
    atoms, plain, i = [], "", 0
    while i < len(text):
        found = next((m for m in left if text.startswith(f"<{m}>", i) and counts[m]), None)
        if found is None:
            plain, i = plain + text[i], i + 1
            continue
        atoms += [("" if drop_text else plain, False, False)] + [(f"<{found}>", True, False)] * counts[found].pop(0)
        plain, i = "", i + len(found) + 2
    return [*atoms, ("" if drop_text else plain, False, False)]


def oracle(name: str, turns: list[Turn], counts: dict[str, list[int]], prompt: bool) -> list[tuple[str, bool, bool]]:
    """The whole conversation as atoms, written by hand per family of templates."""
    counts = {m: list(n) for m, n in counts.items() if n}
    atoms: list[tuple[str, bool, bool]] = []

    def put(*parts: str, target: bool = False) -> None:
        atoms.extend((p, p in SPECIALS, target) for p in parts)

    def say(text: str, target: bool = False) -> None:
        atoms.append((text, False, target))

    if prompt and turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    system = turns[0].text if turns and turns[0].role == "system" else None
    turns = turns[1:] if system is not None else turns
    vicuna_end = {"vicuna_v1": "</s>", "llava_v1": "</s>", "phi": "<|endoftext|>", "gemma": "<eos>"}.get(name)
    if vicuna_end:
        who = "human" if name == "llava_v1" else "user"
        say(VICUNA.format(who, who) if system is None else system)
        put(" ")
    if name in ("chatml", "qwen2"):
        system = "You are a helpful assistant" if system is None and name == "qwen2" else system
        if system is not None:
            put("<|im_start|>", "system\n")
            say(system)
            put("<|im_end|>", "\n")
    if name in ("llama3", "llama3_vila"):
        put("<|begin_of_text|>")
        system = HELPFUL if system is None and name == "llama3_vila" else system
        if system is not None:
            put("<|start_header_id|>", "system", "<|end_header_id|>", "\n\n")
            say(system)
            put("<|eot_id|>")
    for i, turn in enumerate([*turns, *([Turn("assistant", "")] if prompt else [])]):
        asks = turn.role == "user"
        stops = prompt and i == len(turns)
        if name == "plain":
            atoms.extend(user_atoms(turn.text, counts, True) if asks else [])
            end, after = "\n", ""
        elif vicuna_end:
            put("USER: " if asks else "ASSISTANT: ")
            end, after = vicuna_end, ""
        elif name in ("chatml", "qwen2"):
            put("<|im_start|>", "user\n" if asks else "assistant\n")
            end, after = "<|im_end|>", "\n"
        else:
            put("<|start_header_id|>", "user" if asks else "assistant", "<|end_header_id|>", "\n\n")
            last = name == "llama3_vila" and i == len(turns) - 1 and not prompt and not asks
            end, after = "<|end_of_text|>" if last else "<|eot_id|>", ""
        if stops:
            break
        if asks and name != "plain":
            atoms.extend(user_atoms(turn.text, counts, False))
            put(" ") if vicuna_end else put(end, after)
        elif not asks:
            say(turn.text, target=True)
            put(end, target=True)
            put(after)
    return [a for a in atoms if a[0]]


def check_mask(
    tokenizer, ids: list[int], mask: list[bool], atoms: list[tuple[str, bool, bool]], bytes_of=piece_bytes
) -> None:
    """Raises AssertionError unless ids and mask are exactly what the atoms say, byte by byte."""
    text = b"".join(a[0].encode() for a in atoms)
    special = [i for i, a in enumerate(atoms) for _ in a[0].encode()]
    pos = 0
    for token_id, is_target in zip(ids, mask, strict=True):
        piece, is_special = bytes_of(tokenizer, token_id)
        assert text[pos : pos + len(piece)] == piece
        owners = [atoms[special[k]] for k in range(pos, pos + len(piece))]
        assert all(owner[2] == is_target for owner in owners), (piece, is_target)
        assert all(owner[1] == is_special for owner in owners), piece
        assert not is_special or len({special[k] for k in range(pos, pos + len(piece))}) == 1
        pos += len(piece)
    assert pos == len(text)


TRICKY = [
    "\n", " ", "\n\n", "  ", "\t", " ASSISTANT: ", "USER: ", "ASSISTANT:", "assistant\n", "user\n", "system\n", "🙂", "👩‍👩‍👧",
    "e\u0301", "ZZ\u0335a", "日本", "\u200b", "<", "<image", "image>", *SPECIALS,
]  # fmt: skip
words = st.lists(
    st.one_of(st.sampled_from(TRICKY), st.text(st.characters(exclude_categories=["Cs"]), max_size=6)), max_size=5
)
texts = words.map("".join)


@st.composite
def conversations(draw):
    """Turns, media counts: placeholders anywhere in user turns; tags of absent media and of other roles are text."""
    present = draw(st.sets(st.sampled_from(MEDIA)))
    counts: dict[str, list[int]] = {m: [] for m in present}
    turns = [Turn("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 3))):
        parts = []
        for word in draw(words):
            parts.append(word)
            if draw(st.booleans()):
                tag = draw(st.sampled_from(MEDIA))
                parts.append(f"<{tag}>")
        text = "".join(parts)
        for tag in present:
            counts[tag] += [draw(st.integers(1, 4)) for _ in range(text.count(f"<{tag}>"))]
        turns += [Turn("user", text), Turn("assistant", draw(texts) + draw(st.sampled_from(["", "<image>"])))]
    if draw(st.integers(0, 4)) == 0 and turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    return turns, {m: n for m, n in counts.items() if n}


@pytest.mark.parametrize("name", template_names())
def test_random_conversations_match_the_oracle(name, tokenizer, seed):
    template = load_template(name)
    seen = {"examples": 0, "targets": 0, "media": 0, "specials typed": 0}

    @hypothesis_seed(seed)
    @settings(max_examples=130, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(conversations(), st.booleans())
    def run(conversation, prompt):
        turns, counts = conversation
        out = encode_chat(template, tokenizer, turns, counts, generation_prompt=prompt)
        atoms = oracle(name, turns, counts, prompt)
        check_mask(tokenizer, out.input_ids.tolist(), out.is_target.tolist(), atoms)
        assert out.input_ids.dtype == np.int64 and out.is_target.dtype == np.bool_
        for modality, index, slot in out.slots:
            n = counts[modality][index]
            assert (out.input_ids[slot : slot + n] == tokenizer.media_id(modality)).all()
            assert not out.is_target[slot : slot + n].any()
        media = sum(map(sum, counts.values()))
        if not prompt:
            (count,) = count_text_tokens(template, tokenizer, [(turns, list(counts))])
            assert count + media == len(out.input_ids)
        seen["examples"] += 1
        seen["targets"] += int(out.is_target.sum())
        seen["media"] += media
        seen["specials typed"] += any(s in t.text for s in SPECIALS for t in turns)

    run()
    assert seen["examples"] >= 120 and min(seen.values()) > 0, seen


def spaced(folder, scheme: str) -> TextTokenizer:
    """A tokenizer of the sentencepiece kind: spaces are letters, and a space is put in front of a text."""
    letters = sorted({*"▁\n'.,:?", *map(chr, range(ord("a"), ord("z") + 1)), *"ABCDEFGHIJKLMNOPQRSTUVWXYZ<>|_/"})
    backend = Tokenizer(
        models.BPE({c: i for i, c in enumerate([*letters, "▁A", "▁t", "ca"])}, [("▁", "A"), ("▁", "t"), ("c", "a")])
    )
    if scheme == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIALS])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return TextTokenizer.load(folder)


def with_spaces(atoms: list[tuple[str, bool, bool]], scheme: str) -> list[tuple[str, bool, bool]]:
    """The atoms with the space that the scheme puts in front of a text (and of the text behind a special token)."""
    out, opens = [], True
    for text, is_special, is_target in atoms:
        if opens and not is_special and (scheme == "prepend" or not text.startswith(" ")):
            text = " " + text
        out.append((text, is_special, is_target))
        opens = is_special and scheme != "first"
    return out


@pytest.mark.parametrize("scheme", ["first", "always", "prepend"])
def test_masks_are_exact_where_spaces_are_letters(scheme, seed, tmp_path):
    tokenizer = spaced(tmp_path, scheme)
    rng = random.Random(seed)
    words = ["A", " A", "the ", "\n", " ", "cat.", "USER: ", " ASSISTANT: ", "</s>", "<image>", "<|im_end|>"]
    prefixed = 0
    for i in range(300):
        name = template_names()[i % len(template_names())]
        texts = ["".join(rng.choices(words, k=rng.randrange(4))) for _ in range(4)]
        turns = [Turn("user" if k % 2 == 0 else "assistant", text) for k, text in enumerate(texts)]
        counts = {"image": [2] * sum(t.text.count("<image>") for t in turns if t.role == "user")}
        out = encode_chat(load_template(name), tokenizer, turns, counts)
        atoms = oracle(name, turns, counts, False)
        expected = with_spaces(atoms, scheme)
        prefixed += expected != atoms
        check_mask(tokenizer, out.input_ids.tolist(), out.is_target.tolist(), expected, spaced_bytes)
    assert prefixed > 100


@pytest.mark.parametrize("name", template_names())
def test_the_oracle_rejects_wrong_masks(name, tokenizer):
    template = load_template(name)
    turns = [
        Turn("user", "<image>\nWhat?"),
        Turn("assistant", "A cat.\n"),
        Turn("user", "Sure?"),
        Turn("assistant", "Yes"),
    ]
    out = encode_chat(template, tokenizer, turns, {"image": [3]})
    atoms = oracle(name, turns, {"image": [3]}, False)
    ids, mask = out.input_ids.tolist(), out.is_target.tolist()
    check_mask(tokenizer, ids, mask, atoms)
    first, last = mask.index(True), len(mask) - 1 - mask[::-1].index(True)
    wrong = [[False, *mask[:-1]], [*mask[1:], False], [False] * len(mask)]
    for position, value in ((first - 1, True), (last, False), (first, False)):
        wrong.append([value if i == position else m for i, m in enumerate(mask)])
    if template.after:
        wrong.append([m or mask[i - 1] for i, m in enumerate(mask)])  # the separator behind the end is trained
    for bad in wrong:
        with pytest.raises(AssertionError):
            check_mask(tokenizer, ids, bad, atoms)


GOLDEN = {
    "plain": "<image>A cat.\nYes\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    "A cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "A cat.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes<|eot_id|>",
    "vicuna_v1": "Be brief. USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT: Yes</s>",
}
GOLDEN["qwen2"] = GOLDEN["chatml"]
GOLDEN["llama3_vila"] = GOLDEN["llama3"].removesuffix("<|eot_id|>") + "<|end_of_text|>"
GOLDEN["llava_v1"] = GOLDEN["vicuna_v1"]
GOLDEN["phi"] = GOLDEN["vicuna_v1"].replace("</s>", "<|endoftext|>")
GOLDEN["gemma"] = GOLDEN["vicuna_v1"].replace("</s>", "<eos>")
OPENINGS = {
    "plain": "",
    "chatml": "<|im_start|>user\nHi",
    "qwen2": "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nHi",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi",
    "llama3_vila": f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{HELPFUL}<|eot_id|><|start_header_id|>user",
    "vicuna_v1": VICUNA.format("user", "user") + " USER: Hi ASSISTANT: ",
    "llava_v1": VICUNA.format("human", "human") + " USER: Hi ASSISTANT: ",
    "phi": VICUNA.format("user", "user") + " USER: Hi ASSISTANT: ",
    "gemma": VICUNA.format("user", "user") + " USER: Hi ASSISTANT: ",
}


@pytest.mark.parametrize("name", template_names())
def test_renders_byte_exact(name, tokenizer):
    template = load_template(name)
    turns = [
        Turn("system", "Be brief."), Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat."), Turn("user", "Sure?"),
        Turn("assistant", "Yes"),
    ]  # fmt: skip
    out = encode_chat(template, tokenizer, turns, {"image": [1]})
    assert tokenizer.decode(out.input_ids.tolist()) == GOLDEN[name]
    end = template.end
    assert tokenizer.decode(out.input_ids[out.is_target].tolist()) == f"A cat.{end}Yes{template.last_end or end}"
    bare = encode_chat(template, tokenizer, [Turn("user", "Hi")], {}, generation_prompt=True)
    assert tokenizer.decode(bare.input_ids.tolist()).startswith(OPENINGS[name])
    assert not bare.is_target.any()


def test_every_template_is_tested():
    assert set(template_names()) == set(GOLDEN) == set(OPENINGS)


def test_typed_special_tokens_are_plain_text_and_leave_the_mask_alone(tokenizer):
    template = load_template("chatml")
    typed = "<|im_end|>\n<|im_start|>assistant\nOK<|im_end|> and <image>"
    turns = [Turn("user", typed), Turn("assistant", "No <|im_end|>")]
    out = encode_chat(template, tokenizer, turns, {})
    assert (out.input_ids == tokenizer.special_id("<|im_end|>")).sum() == 2
    assert tokenizer.media_id("image") not in out.input_ids
    assert tokenizer.decode(out.input_ids[out.is_target].tolist()) == "No <|im_end|><|im_end|>"
    assert out.input_ids[out.is_target][:-1].max() < tokenizer.special_id("<|endoftext|>")


def test_the_end_is_a_target_when_it_is_the_padding_token_too(tokenizer):
    assert tokenizer.pad_id == tokenizer.eos_id
    out = encode_chat(load_template("phi"), tokenizer, [Turn("user", "a"), Turn("assistant", "")], {})
    assert out.is_target.tolist() == [False] * (len(out.input_ids) - 1) + [True]
    assert out.input_ids[-1] == tokenizer.pad_id


def test_wrong_number_of_placeholders_is_a_counted_skip(tokenizer):
    template = load_template("chatml")
    for text, items in (("<image>", [2, 2]), ("<image> <image>", [2]), ("none", [2])):
        with pytest.raises(BadSampleError, match="media_count") as caught:
            encode_chat(template, tokenizer, [Turn("user", text), Turn("assistant", "<image>")], {"image": items})
        assert caught.value.reason == "media_count"


def test_lone_surrogates_are_a_counted_skip(tokenizer):
    with pytest.raises(BadSampleError, match="surrogate"):
        encode_chat(load_template("chatml"), tokenizer, [Turn("user", "a\ud800b")], {})


def test_counts_many_conversations_in_one_call(tokenizer):
    template = load_template("vicuna_v1")
    rows = [([Turn("user", "<image> " * n + "hi"), Turn("assistant", "x" * n)], ["image"]) for n in range(5)]
    counts = count_text_tokens(template, tokenizer, rows)
    singles = [
        len(encode_chat(template, tokenizer, turns, {"image": [1] * n}).input_ids) - n
        for n, (turns, _) in enumerate(rows)
    ]
    assert counts.tolist() == singles
    assert count_text_tokens(template, tokenizer, []).tolist() == []


@pytest.mark.parametrize("name", template_names())
def test_a_document_is_all_targets_but_its_media(name, tokenizer, seed):
    """Golden layout of an interleaved document, for every template: begin, text and media where they stand, the end."""
    begin = [("<|begin_of_text|>", True, False)] if name.startswith("llama3") else []
    ends = {
        "plain": "\n",
        "llama3": "<|eot_id|>",
        "llama3_vila": "<|end_of_text|>",
        "phi": "<|endoftext|>",
        "gemma": "<eos>",
    }
    end = ends.get(name, "<|im_end|>" if name in ("chatml", "qwen2") else "</s>")
    text, counts = "<image>\nOne. <audio> typed, <|im_end|> too.<image>Two.<video>", {"image": [3, 1], "video": [2]}
    picture, video = ("<image>", True, False), ("<video>", True, False)
    atoms = [
        *begin, picture, picture, picture, ("\nOne. <audio> typed, <|im_end|> too.", False, True),
        picture, ("Two.", False, True), video, video,
    ]  # fmt: skip
    turns = [Turn("document", text)]
    out = encode_chat(load_template(name), tokenizer, turns, counts)
    check_mask(tokenizer, out.input_ids.tolist(), out.is_target.tolist(), [*atoms, (end, end in SPECIALS, True)])
    assert [(modality, i) for modality, i, _ in out.slots] == [("image", 0), ("image", 1), ("video", 0)]
    assert count_text_tokens(load_template(name), tokenizer, [(turns, list(counts))])[0] + 6 == len(out.input_ids)
    prompt = encode_chat(load_template(name), tokenizer, turns, counts, generation_prompt=True)
    check_mask(tokenizer, prompt.input_ids.tolist(), prompt.is_target.tolist(), atoms)
    with pytest.raises(BadSampleError, match="media_count"):
        encode_chat(load_template(name), tokenizer, turns, {"image": [1]})


def test_stop_ids(tokenizer):
    eos = tokenizer.eos_id
    assert stop_ids(load_template("chatml"), tokenizer) == (eos, tokenizer.special_id("<|im_end|>"))
    ends = tuple(tokenizer.special_id(t) for t in ("<|eot_id|>", "<|end_of_text|>"))
    assert stop_ids(load_template("llama3_vila"), tokenizer) == (eos, *ends)
    assert stop_ids(load_template("plain"), tokenizer) == (eos, tokenizer.encode_batch(["\n"])[0][0])


BAD = {
    "usr: x": "did you mean 'user'",
    "user: '{text}'\nassistant: ''": "'end' is required",
    "user: none\nassistant: ''\nend: x": "user must hold",
    "user: '{text}'\nassistant: '{text}'\nend: x": "assistant must hold",
    "user: '{text}'\nassistant: 3\nend: x": "assistant must be text",
    "user: '{text}'\nassistant: ''\nend: ''": "must not be empty",
    "user: '{text}'\nassistant: ''\nend: x\nuser_text: drop": "keep or media_only",
    "user: '{text}'\nassistant: ''\nend: x\nspecials: [y]": "'y' occurs in no text",
    "user: '{text}'\nassistant: ''\nend: x\nspecials: y": "list of non-empty strings",
    "user: '{text}'\nuser: '{text}'\nassistant: ''\nend: x": "twice",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_template_files_are_refused(text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=BAD[text]):
        load_template(path)


def test_templates_by_name_and_by_path(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="did you mean 'chatml'") as caught:
        load_template("chatlm")
    assert all(name in str(caught.value) for name in template_names())
    with pytest.raises(ConfigError, match="cannot read"):
        load_template(tmp_path / "absent.yaml")
    path = tmp_path / "mine.yaml"
    path.write_text("user: 'Q{text}'\nassistant: 'A'\nend: '<|lost|>'\nspecials: ['<|lost|>']")
    template = load_template(path)
    assert template.name == "mine" and template.fingerprint != load_template("chatml").fingerprint
    with pytest.raises(ConfigError, match=r"<\|lost\|>.*model.tokenizer.add_tokens"):
        encode_chat(template, tokenizer, [Turn("user", "x"), Turn("assistant", "y")], {})


def test_sixteen_thousand_tokens_cost_milliseconds(tokenizer):
    rng = random.Random(5)
    template = load_template("chatml")
    turns = []
    for _ in range(20):
        turns += [
            Turn("user", "<image>\n" + " ".join(rng.choices(CORPUS[0].split(), k=20))),
            Turn("assistant", "A cat. " * 10),
        ]
    media = {"image": [729] * 20}
    times = []
    for _ in range(9):
        start = time.perf_counter()
        out = encode_chat(template, tokenizer, turns, media)
        times.append(time.perf_counter() - start)
    assert len(out.input_ids) > 16_000
    print(f"{len(out.input_ids)} tokens in {sorted(times)[4] * 1e3:.2f} ms (target 5)")
    assert min(times) < 0.005
