"""Mode `anyres` is LLaVA-NeXT: bytes through our encoder, collator and model give the logits of Hugging Face's own classes."""

import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from mmscale.config.schema import ImageDataConfig
from mmscale.config.specs import extra_tokens, media_specs
from mmscale.kernels.placement import media_positions
from mmscale.model.composite import build_model
from mmscale.model.convert import to_llava
from mmscale.model.hub import MmscaleForConditionalGeneration
from mmscale.serve.generate import CHAT_FILE, Generator
from mmscale.streaming.chat import load_template, to_jinja
from mmscale.streaming.collate import collate
from mmscale.streaming.encode import Encoder
from mmscale.streaming.media import probe
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import NEWLINE_TOKEN, MediaBytes, Sample, Turn

REPO = Path(__file__).parents[2]
SIDE, PATCH = 28, 7
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
CLIP = {"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": PATCH, "projection_dim": 8}
SIZES = {
    "wide": [(100, 50)],
    "tall": [(33, 90)],
    "square": [(56, 56)],
    "smaller than a tile": [(11, 9)],
    "a line": [(400, 5)],
    "a column": [(3, 500)],
    "two": [(61, 40), (17, 120)],
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}')
    return folder


@pytest.fixture
def ours(tiny_config, tokenizer_folder):
    """Our model and encoder for tiles of 28 pixels; the default grids are those of LLaVA-NeXT."""
    config = tiny_config(vision=CLIP, vision_keys={"connector": "mlp2x_gelu", "select_layer": -2}, audio=None)
    data = config.data.model_copy(update={"image": ImageDataConfig(mode="anyres")})
    specs = media_specs(config.model, data)
    assert [list(grid) for grid in specs.image.grids] == PINPOINTS
    tokenizer = TextTokenizer.load(tokenizer_folder, extra_tokens(data))
    model = build_model(config, tokenizer.vocab_size, specs).eval()
    return model, Encoder(tokenizer, load_template("chatml"), specs, 4096, "error", 10**6)


def their_model(model, encoder, folder):
    """LlavaNext as transformers builds it, with random weights, which are then put into ours."""
    torch.manual_seed(0)
    vision, text = model.config.vision_config.to_dict(), model.config.text_config.to_dict()
    theirs = LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text), image_grid_pinpoints=PINPOINTS,
            image_token_id=encoder.tokenizer.media_id("image"), vision_feature_layer=-2,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(folder)
    # Versions of transformers differ in whether the tower has the level `vision_model.`.
    tensors = {name.replace("vision_model.", ""): t for name, t in load_file(folder / "model.safetensors").items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[to_llava(name).replace("vision_model.", "")])
        rows = model.llm.get_input_embeddings().weight
        rows[encoder.tokenizer.special_id(NEWLINE_TOKEN)] = theirs.model.image_newline
    return theirs


def their_processor(encoder, folder):
    encoder.tokenizer.save(folder, to_jinja(encoder.template))
    image = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    return LlavaNextProcessor(
        image, AutoTokenizer.from_pretrained(folder), patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>",
    )  # fmt: skip


def noise(seed, sizes):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def png(picture):
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_logits_equal_llava_next(sizes, ours, tmp_path, seed):
    model, encoder = ours
    theirs, processor = their_model(model, encoder, tmp_path), their_processor(encoder, tmp_path)
    pictures = noise(seed, sizes)
    files = [png(picture) for picture in pictures]
    turns = (Turn("user", "What is on " + "<image> and ".join([""] * (len(files) + 1)) + "?"), Turn("assistant", "A"))
    document = encoder.encode(Sample("s", turns, tuple(MediaBytes("image", "png", data) for data in files)))

    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False)
    inputs = processor(text=[text], images=pictures, return_tensors="pt")
    ids, newline = inputs["input_ids"][0], encoder.tokenizer.special_id(NEWLINE_TOKEN)
    is_newline = document.input_ids == newline
    assert len(document) == len(ids) and torch.equal(document.input_ids[~is_newline], ids[~is_newline])
    assert (ids[is_newline] == encoder.tokenizer.media_id("image")).all() and not document.is_target[is_newline].any()
    planned = [encoder.planned("image", probe("png", data)) for data in files]
    assert [(m.num_tokens, len(m.data)) for m in document.media] == planned

    with torch.no_grad():
        mine = model.logits(collate([document], encoder.specs), torch.arange(len(document)))
        expected = theirs(**inputs).logits[0]
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def test_answers_of_an_export_equal_llava_next(ours, tmp_path, seed):
    """Greedy answers, through `mmscale.load` and its KV cache, to pictures of several shapes in one batch."""
    model, encoder = ours
    theirs, processor = their_model(model, encoder, tmp_path / "hf"), their_processor(encoder, tmp_path / "hf")
    with torch.no_grad():  # sharper logits, so that no two are within rounding of each other
        for head in (theirs.lm_head, model.llm.lm_head):
            head.weight.mul_(50)
    config = model.config
    config.media_token_ids = {"image": encoder.tokenizer.media_id("image")}
    export = MmscaleForConditionalGeneration(config)
    export.load_state_dict(model.state_dict())
    export.save_pretrained(tmp_path / "own")
    encoder.tokenizer.save(tmp_path / "own", to_jinja(encoder.template))
    shutil.copy(REPO / "configs/chat/chatml.yaml", tmp_path / "own" / CHAT_FILE)
    generator = Generator.from_folder(tmp_path / "own")
    generator.model.generation_config.eos_token_id = encoder.tokenizer.eos_id

    pictures = noise(seed, [(61, 40), (17, 120), (30, 30)])
    samples = [
        Sample("one", (Turn("user", "<image>\nWhat?"),), (MediaBytes("image", "png", png(pictures[0])),)),
        Sample(
            "two",
            (Turn("user", "<image><image> Which one?"),),
            tuple(MediaBytes("image", "png", png(p)) for p in pictures[1:]),
        ),
        Sample("none", (Turn("user", "Hello"),), ()),
    ]
    batched = [answer.ids for answer in generator.answer(samples, 6)]
    assert batched == [generator.answer([sample], 6)[0].ids for sample in samples]
    given = iter(pictures)
    for sample, answer in zip(samples, batched, strict=True):
        messages = [{"role": "user", "content": sample.turns[0].text}]
        text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], images=[next(given) for _ in sample.media] or None, return_tensors="pt")
        ids = {k: v for k, v in inputs.items() if k != "token_type_ids"}
        out = theirs.generate(
            **ids, do_sample=False, max_new_tokens=6, eos_token_id=encoder.tokenizer.eos_id, pad_token_id=0
        )
        made = out[0, ids["input_ids"].shape[1] :].tolist()
        assert list(answer) == [t for t in made if t != encoder.tokenizer.eos_id], sample.id


def test_the_newline_row_and_the_order_of_rows_matter(ours, tmp_path, seed):
    """The comparison above would notice another newline embedding and rows in another order."""
    model, encoder = ours
    their_model(model, encoder, tmp_path)
    media = (MediaBytes("image", "png", png(noise(seed, [(100, 50)])[0])),)
    document = encoder.encode(Sample("s", (Turn("user", "<image>?"), Turn("assistant", "A")), media))
    pack = collate([document], encoder.specs)
    last = torch.tensor([len(document) - 1])
    is_media = pack.source_index >= len(document)
    with torch.no_grad():
        right = model.logits(pack, last)
        pack.source_index[is_media] = pack.source_index[is_media].flip(0)
        pack.media_positions[:] = media_positions(pack.source_index, len(pack.media_positions))
        assert (model.logits(pack, last) - right).abs().max() > 1e-3
        model.llm.get_input_embeddings().weight[encoder.tokenizer.special_id(NEWLINE_TOKEN)] += 1
        assert (model.logits(collate([document], encoder.specs), last) - right).abs().max() > 1e-3
