"""From a trained run to answers: both exports, in fresh processes, with and without mmscale."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

REPO = Path(__file__).parents[2]
RECIPE = REPO / "configs/recipes/digits.yaml"
SMALL = [
    "train.steps=4", "train.save_every=4", "train.warmup_steps=1", "train.global_batch=2", "data.plan_group=1", "data.seq_len=384",
    "data.window=64", "data.workers=0", "eval.every=0", "run.tensorboard=false", "run.threads=1", "run.device=cpu",
]  # fmt: skip


def _train(demo_data, run, overrides=()):
    from mmscale.config.load import load_config
    from mmscale.config.schema import ParallelConfig
    from mmscale.parallel.mesh import init_mesh
    from mmscale.train.loop import train

    config = load_config(RECIPE, [f"data.root={demo_data}", f"run.dir={run}", *SMALL, *overrides])
    train(config, init_mesh(ParallelConfig(), "cpu"))


@pytest.fixture(scope="module")
def trained(demo_data, tmp_path_factory):
    """A run of four steps."""
    run = tmp_path_factory.mktemp("trained") / "run"
    _train(demo_data, run)
    return run


@pytest.fixture(scope="module")
def exports(trained, tmp_path_factory):
    """The own export and the stock LLaVA export; each has proved itself in a fresh process."""
    from mmscale.train.consolidate import consolidate

    folder = tmp_path_factory.mktemp("exports")
    own = consolidate(trained, folder / "own", max_shard_bytes=500_000)
    llava = consolidate(trained, folder / "llava", target="llava", drop=["audio"])
    return own, llava


def test_exports_say_what_they_are(exports):
    own, llava = exports
    assert (own.target, own.left_out) == ("mmscale", ())
    assert (llava.target, llava.left_out) == ("llava", ("audio",))
    assert own.logit_error <= 1e-6
    assert llava.logit_error <= 1e-6
    assert own.num_tensors > llava.num_tensors


def test_tensors_are_the_checkpoints_and_files_are_of_the_asked_size(exports, trained):
    from mmscale.train.checkpoint import newest_checkpoint

    folder = exports[0].folder
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files == sorted(p.name for p in folder.glob("*.safetensors"))
    reader = newest_checkpoint(trained / "checkpoints")
    seen = {}
    for file in files:
        tensors = load_file(folder / file)
        assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors.values()) <= 500_000
        seen |= tensors
    assert {f"model.{n}" for n in seen} == {n for n in reader.names if n.startswith("model.")}
    assert all(torch.equal(t, reader.read(f"model.{n}")) for n, t in seen.items())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in seen.values())


def test_llava_answers_equal_ours_token_for_token_without_mmscale(exports, demo_data, tmp_path):
    """The stock script imports nothing of mmscale, which it asserts itself."""
    from mmscale import load
    from mmscale.eval.exact_match import ask, score_table
    from mmscale.streaming.shards import ShardSet

    own, llava = exports
    names = ("digits", "compare", "words")
    folders = [demo_data / "heldout" / name for name in names]
    out = tmp_path / "stock.jsonl"
    script = REPO / "mmscale/eval/stock_llava.py"
    done = subprocess.run(
        [sys.executable, "-P", script, llava.folder, *folders, "--out", out, "--batch-size", "7", "--max-new-tokens", "5"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stock = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    shards = [ShardSet.open(folder, name) for folder, name in zip(folders, names, strict=True)]
    ours = [row for rows in ask(load(own.folder), shards, ["image"], 16, 5) for row in rows]
    assert len(ours) == len(stock) == sum(len(s) for s in shards) > 10
    for row in ours:
        assert row["answer_ids"] == stock[row["id"]]["answer_ids"]
        assert row["truth"] == stock[row["id"]]["truth"]
    assert set(score_table(ours)) == set(names)
    through_processor = [row for rows in ask(load(llava.folder), shards, ["image"], 16, 5) for row in rows]
    assert [r["answer_ids"] for r in through_processor] == [r["answer_ids"] for r in ours]


def test_batched_answers_equal_single_ones_with_sound_and_pictures(exports, demo_data):
    from mmscale import load
    from mmscale.eval.exact_match import first_question
    from mmscale.streaming.shards import ShardSet

    generator = load(exports[0].folder)
    samples = []
    for name in ("audio", "digits", "compare"):
        shards = ShardSet.open(demo_data / "heldout" / name, name)
        samples += [first_question(shards.read(row))[0] for row in range(min(3, len(shards)))]
    together = generator.answer(samples, 6)
    assert [generator.answer([sample], 6)[0] for sample in samples] == together


def test_generate_command(exports, demo_data, tmp_path):
    from mmscale.streaming.shards import ShardSet

    sample = ShardSet.open(demo_data / "heldout/digits", "digits").read(0)
    picture = tmp_path / "digit.png"
    picture.write_bytes(sample.media[0].data)
    mmscale = Path(sys.executable).parent / "mmscale"
    command = [
        mmscale,
        "generate",
        exports[0].folder,
        "--prompt",
        "Which digit is this?",
        "--image",
        picture,
        "--max-new-tokens",
        "3",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    from mmscale import load
    from mmscale.eval.exact_match import first_question

    expected = load(exports[0].folder).answer([first_question(sample)[0]], 3)[0].text
    assert done.stdout == expected + "\n"
    wrong = subprocess.run([*command[:-1], "3", "--audio", picture], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "--audio" in wrong.stderr


def test_rows_that_cannot_be_read_are_named_and_left_out(exports, demo_data, tmp_path):
    import shutil

    from mmscale import load
    from mmscale.data_tools.writer import ShardWriter
    from mmscale.eval.exact_match import ask, score_table
    from mmscale.streaming.shards import ShardSet

    good = ShardSet.open(demo_data / "heldout/digits", "digits")
    members = dict(good.members(0))
    with ShardWriter(tmp_path / "odd") as writer:
        writer.write("digits_0", members)
        writer.write(
            "digits_1", {**members, "png": members["png"][:80]} if "png" in members else {**members, "0.png": b"x"}
        )
        writer.write("digits_2", {**members, "json": b"\xff"})
        writer.write("digits_3", members)
    for export in exports:
        rows = [
            row
            for part in ask(load(export.folder), [ShardSet.open(tmp_path / "odd", "odd")], ["image"], 4, 3)
            for row in part
        ]
        assert sorted(r["id"][-1] for r in rows) == ["0", "1", "2", "3"]
        assert sorted(r["id"][-1] for r in rows if "skipped" in r) == ["1", "2"]
        assert score_table(rows)["digits"][1] == 2
    shutil.rmtree(tmp_path / "odd")


def test_bf16_export_is_rounded_once(trained, tmp_path):
    from mmscale.train.checkpoint import newest_checkpoint
    from mmscale.train.consolidate import consolidate

    export = consolidate(trained, tmp_path / "bf16", dtype="bf16")
    tensors = load_file(export.folder / "model.safetensors")
    reader = newest_checkpoint(trained / "checkpoints")
    assert all(
        t.dtype == torch.bfloat16 and torch.equal(t, reader.read(f"model.{n}").bfloat16()) for n, t in tensors.items()
    )


def test_without_a_proof_the_same_files_and_it_is_said(exports, trained, tmp_path):
    mmscale = Path(sys.executable).parent / "mmscale"
    command = [mmscale, "consolidate", trained, tmp_path / "own", "--no-proof", "--max-shard-gb", "0.001"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "not proved" in done.stdout and "proved in a fresh process" not in done.stdout
    unproved, proved = ({n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
                        for folder in (tmp_path / "own", exports[0].folder))  # fmt: skip
    assert unproved.keys() == proved.keys() and all(torch.equal(t, proved[n]) for n, t in unproved.items())


def test_a_model_of_tiles_with_newlines_exports_and_answers(demo_data, tmp_path):
    from mmscale import load
    from mmscale.errors import ConfigError
    from mmscale.eval.exact_match import first_question
    from mmscale.streaming.shards import ShardSet
    from mmscale.train.consolidate import consolidate

    run = tmp_path / "run"
    _train(demo_data, run, ["train.steps=1", "train.save_every=1", "data.seq_len=1024", "data.image.mode=anyres"])
    export = consolidate(run, tmp_path / "own")
    assert export.target == "mmscale" and export.logit_error <= 1e-6
    with pytest.raises(ConfigError, match=r"data\.image\.mode=anyres, not resize or square"):
        consolidate(run, tmp_path / "llava", target="llava", drop=["audio"])
    generator = load(export.folder)
    samples = []
    for name in ("compare", "digits", "audio"):
        shards = ShardSet.open(demo_data / "heldout" / name, name)
        samples += [first_question(shards.read(row))[0] for row in range(2)]
    inputs = generator.inputs(samples)
    assert (
        len(inputs["pixel_values"]) > 4
        and inputs["image_rows"].max() < len(inputs["pixel_values"]) * generator.model.vision.rows
    )
    assert [generator.answer([sample], 4)[0] for sample in samples] == generator.answer(samples, 4)


def test_a_wrong_export_is_caught_and_nothing_is_kept(trained, tmp_path, monkeypatch):
    """Two connector matrices swapped: valid files that any loader opens, and a different model."""
    from mmscale.errors import CheckpointError
    from mmscale.train import consolidate as module

    def swap(folder, count):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        names = [n for n in tensors if n.endswith("self_attn.q_proj.weight") and n.startswith("llm")]
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
        save_file(tensors, file, metadata={"format": "pt"})
        return count

    close = module.SafetensorsWriter.close
    monkeypatch.setattr(module.SafetensorsWriter, "close", lambda self: swap(self._folder, close(self)))
    with pytest.raises(CheckpointError, match="logits"):
        module.consolidate(trained, tmp_path / "wrong")
    assert list(tmp_path.iterdir()) == []


def test_refusals(trained, exports, tmp_path):
    from mmscale.errors import CheckpointError, ConfigError
    from mmscale.train.consolidate import consolidate

    with pytest.raises(ConfigError, match="audio"):
        consolidate(trained, tmp_path / "a", target="llava")
    with pytest.raises(ConfigError, match="found files in"):
        consolidate(trained, exports[0].folder)
    with pytest.raises((CheckpointError, ConfigError)):
        consolidate(tmp_path, tmp_path / "b")
