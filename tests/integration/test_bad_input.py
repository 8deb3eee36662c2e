"""Bad data and bad configs through the real training loop and the real command.

Rows of the list of bad inputs (shards A, media B, text C) and their tests, each between good samples and with the account
`indexed = delivered + skipped`; R = test_bad_input_rows.py, which reads them through the real index and stream:

    A1 A2 A7 A8     R test_a_bad_shard_is_put_aside_between_good_ones
    A3              R test_commands_in_place_of_a_folder_are_refused; unit/test_storage.py, unit/test_shards.py
    A4 A5 A10 A11   R test_members_that_no_reader_takes_are_left_out; unit/test_tar_index.py
    A6              R test_a_bad_shard_..., test_a_shard_lost_in_the_third_epoch_ends_the_run
    A9              R test_a_bomb_is_refused_without_unpacking_it; unit/test_storage.py (zstd), unit/test_convert_data.py
    A12             R test_a_sample_in_two_places_is_not_trained_on
    A13 B1 B2 B3    R test_a_bad_sample_costs_itself_alone; below test_every_indexed_sample_is_delivered_or_skipped_by_reason
    A14 A15         R test_a_shard_listed_twice_is_refused, ..._of_other_content_is_put_aside; below ..._changed_after_...
    A16             R test_a_shard_lost_in_the_third_epoch_ends_the_run; unit/test_shards.py (tried again)
    B4              R test_unusual_pictures_are_delivered_as_upright_rgb; unit/test_decode_image.py
    B5              R test_a_bad_sample_costs_itself_alone; unit/test_decode_audio.py
    B6              R the same, test_a_lying_duration_is_not_believed, test_a_clip_that_hangs_the_decoder_is_skipped_in_time;
                    unit/test_workers.py (a decoder that hangs or crashes in each way)
    C1 C2 C3        R test_a_bad_sample_costs_itself_alone; unit/test_rows.py
    C4              R test_special_strings_in_user_text_are_text; unit/test_chat.py
    C5              R test_long_samples_never_reach_into_another_document
"""

import io
import json
import logging
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "configs/recipes/digits.yaml"
MMSCALE = Path(sys.executable).parent / "mmscale"
ROWS = 40


def png(size=8):
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg_cut_in_half():
    from PIL import Image

    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def row(question="<image>\nWhat?", answer="red"):
    return json.dumps(
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
    ).encode()


BAD = {
    "half_jpeg": {"json": row(), "jpg": jpeg_cut_in_half()},
    "more_tags": {"json": row("<image><image>\nWhat?"), "png": png()},
    "wrong_type": {"json": b'{"conversations": "a string"}', "png": png()},
    "not_utf8": {"json": b'{"conversations": [{"from": "human", "value": "\xff\xfe"}]}', "png": png()},
    "nan": {"json": row().replace(b'"red"', b"NaN"), "png": png()},
    "no_json": {"png": png()},
}


def write_tar(path, samples):
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for ext, data in members.items():
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def mixed(tmp_path, demo_data):
    """A data set indexed from foreign tars: bad rows between good ones, and beside them an empty and a cut tar."""
    from mmscale.data_tools.indexing import index_folder

    root = tmp_path / "data"
    folder = root / "train"
    folder.mkdir(parents=True)
    shutil.copytree(demo_data / "tokenizer", root / "tokenizer")
    good = {f"good_{i:03d}": {"json": row(answer=f"red {i}"), "png": png()} for i in range(ROWS)}
    names = list(good)
    samples = {}
    for i, name in enumerate(names):
        samples[name] = good[name]
        if i % 6 == 5 and i // 6 < len(BAD):
            key = list(BAD)[i // 6]
            samples[key] = BAD[key]
    write_tar(folder / "000000.tar", samples)
    write_tar(folder / "000001.tar", {f"more_{i}": {"json": row(answer="blue"), "png": png()} for i in range(5)})
    (folder / "000002.tar").write_bytes(b"")
    index_folder(folder)
    return root


def one_source(root, run, *more):
    """The recipe with a single source, through a config file of its own."""
    path = root / "config.yaml"
    text = RECIPE.read_text().replace("include: [../model/tiny-siglip-whisper-llama.yaml, ../data/demo.yaml]", "")
    text = re.sub(r"\neval:.*?\nrun:", "\nrun:", text, flags=re.S)
    model = RECIPE.parents[1] / "model/tiny-siglip-whisper-llama.yaml"
    path.write_text(
        f"include: [{model}]\n{text}\ndata:\n  root: {root}\n  sources: {{only: {{path: train}}}}\n  seq_len: 256\n  plan_group: 1\n"
        "  window: 64\n  workers: 0\n"
    )
    base = [
        f"run.dir={run}",
        "train.save_every=100",
        "train.warmup_steps=0",
        "train.global_batch=2",
        "run.tensorboard=false",
        "run.threads=1",
    ]
    return path, [*base, *more]


def train_here(path, words):
    from mmscale.config.load import load_config
    from mmscale.config.schema import ParallelConfig
    from mmscale.parallel.mesh import init_mesh
    from mmscale.train.loop import train

    train(load_config(path, words), init_mesh(ParallelConfig(), "cpu"))


def test_every_indexed_sample_is_delivered_or_skipped_by_reason(mixed, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mmscale"), "propagate", True)
    run = tmp_path / "run"
    path, words = one_source(mixed, run, "train.steps=8", "data.max_bad=1.0")
    with caplog.at_level(logging.INFO):
        train_here(path, words)
    lines = [r.getMessage() for r in caplog.records if "indexed" in r.getMessage() and "epoch 0" in r.getMessage()]
    assert len(lines) == 1, [r.getMessage() for r in caplog.records]
    indexed, delivered, skipped, reasons = re.search(
        r"indexed (\d+) = delivered (\d+) \+ skipped (\d+) \((.*)\)", lines[0]
    ).groups()
    assert int(indexed) == int(delivered) + int(skipped)
    assert int(delivered) == ROWS + 5
    assert int(skipped) == len(BAD)
    assert sum(int(n) for n in re.findall(r" (\d+)", reasons)) == len(BAD)
    assert "media_count 1" in reasons
    first_epoch = json.loads((run / "skipped.jsonl").read_text().splitlines()[0])
    assert first_epoch["id"] == "train/000000.tar:half_jpeg"
    assert first_epoch["reason"] == "decode_image"
    assert first_epoch["offset"] > 0


def test_too_many_bad_samples_stop_the_run(mixed, tmp_path):
    from mmscale.errors import DataError

    path, words = one_source(mixed, tmp_path / "run", "train.steps=120", "data.max_bad=0.05")
    with pytest.raises(DataError, match=r"data\.max_bad=5\.0%.*found \d+ of \d+"):
        train_here(path, words)


def test_on_error_raise_names_the_sample(mixed, tmp_path):
    from mmscale.errors import DataError

    path, words = one_source(mixed, tmp_path / "run", "train.steps=5", "data.on_error=raise")
    with pytest.raises(DataError, match=r"more_tags at offset \d+: .*media_count"):
        train_here(path, words)


def test_a_shard_changed_after_indexing_is_put_aside_by_name(mixed, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("mmscale"), "propagate", True)
    shard = mixed / "train/000001.tar"
    data = bytearray(shard.read_bytes())
    at = data.index(b"blue")
    data[at : at + 4] = b"pink"
    shard.write_bytes(data)
    path, words = one_source(mixed, tmp_path / "run", "train.steps=8", "data.max_bad=1.0")
    with caplog.at_level(logging.INFO):
        train_here(path, words)
    assert any("000001.tar" in r.getMessage() and "put aside" in r.getMessage() for r in caplog.records)
    ledger = (tmp_path / "run/ledger.jsonl").read_text()
    assert "000000.tar:good_000" in ledger
    assert "more_" not in ledger
    line = next(r.getMessage() for r in caplog.records if "indexed" in r.getMessage() and "epoch 0" in r.getMessage())
    assert "quarantined 5" in line


@pytest.mark.parametrize(
    ("word", "code", "text"),
    [
        ("train.lerning=1", 2, "unknown key 'train.lerning'"),
        ("train.lr=fast", 2, "train.lr"),
        ("data.sources.digits.path=nowhere", 2, "nowhere"),
        ("data.template=chatlm", 2, "did you mean 'chatml'"),
        ("model.vision.connector=mlp2x_relu", 2, "mlp2x_gelu"),
        ("model.llm.config.model_type=lama", 2, "lama"),
        ("model.tokenizer.path=nowhere", 2, "nowhere"),
        ("data.seq_len=20", 2, "data.seq_len"),
        ("parallel.ulysses=2", 2, "parallel.ulysses"),
        ("model.audio.window_s=3", 2, "window_s"),
        ("model.llm.config.num_attention_heads=3", 2, "model.llm.config"),
        ("model.llm.config.num_attention_heads=0", 2, "model.llm.config"),
        ("model.llm.config.num_key_value_heads=3", 2, "num_key_value_heads=3"),
        ("model.llm.config.hidden_size=abc", 2, "model.llm.config"),
        ("eval.sources.digits.path=nope", 2, "nope"),
        ("data.template=vicuna_v1", 2, "</s>"),
    ],
)
def test_bad_configs_are_refused_in_one_line(demo_data, tmp_path, word, code, text):
    from typer.testing import CliRunner

    from mmscale.cli.main import app
    from mmscale.errors import MmscaleError

    result = CliRunner().invoke(
        app, ["check", str(RECIPE), f"data.root={demo_data}", f"run.dir={tmp_path / 'run'}", word]
    )
    assert isinstance(result.exception, MmscaleError), result.output
    assert result.exception.exit_code == code
    assert text in str(result.exception)
    assert "\n" not in str(result.exception)


def test_the_command_exits_2_with_one_line_and_no_traceback(demo_data, tmp_path):
    command = [
        MMSCALE,
        "train",
        RECIPE,
        f"data.root={demo_data}",
        f"run.dir={tmp_path / 'run'}",
        "train.global_batch=3",
        "data.plan_group=2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert done.stderr.startswith("ConfigError: train.global_batch=3")
    assert not (tmp_path / "run").exists()


def test_check_prints_layout_sources_and_parts(demo_data, tmp_path):
    from typer.testing import CliRunner

    from mmscale.cli.main import app

    result = CliRunner().invoke(
        app, ["check", str(RECIPE), f"data.root={demo_data}", f"run.dir={tmp_path / 'run'}", "--world-size", "2"]
    )
    assert result.exit_code == 0, result.output
    for text in (
        "2 = tensor 1 x ulysses 1 x ring 1 x data 2",
        "tokens per step",
        "vision_connector",
        "audio",
        "digits",
    ):
        assert text in result.output
    assert not (tmp_path / "run").exists()


def test_a_diverged_run_stops_and_saves_nothing_that_is_not_finite(mixed, tmp_path):
    from mmscale.errors import DivergedError

    path, words = one_source(
        mixed, tmp_path / "run", "train.steps=40", "train.save_every=1", "train.clip=0", "data.max_bad=1.0"
    )
    with pytest.raises(DivergedError, match=r"3 steps without.*after 3 rollbacks"):
        train_here(path, [*words, "train.lr=1e30", "train.optimizer=sgd"])
    from mmscale.train.checkpoint import newest_checkpoint

    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    bad = [r["step"] for r in steps if r["loss"] is None or r["grad_norm"] is None]
    assert len(bad) >= 3
    assert newest_checkpoint(tmp_path / "run/checkpoints").step < min(bad)
    assert not (tmp_path / "run/DONE").exists()


def test_a_damaged_done_marker_is_told_and_ignored(mixed, tmp_path):
    path, words = one_source(mixed, tmp_path / "run", "train.steps=2", "data.max_bad=1.0")
    train_here(path, words)
    (tmp_path / "run/DONE").write_text("")
    train_here(path, words)
    assert json.loads((tmp_path / "run/DONE").read_text()) == {"step": 2}
