"""A recorded step done again: equal to the bit, with the pack that is to blame named, and nothing written into the run."""

import json
import shutil
import subprocess

import pytest
from guarded_runs import MMSCALE, STEPS, events, ledger, on_ranks, rows, train_here

from mmscale.errors import ConfigError, DataError


def replay_here(run, step):
    from mmscale.config.env import Launch
    from mmscale.parallel.mesh import init_mesh
    from mmscale.train.replay import replay, replay_config

    config = replay_config(run, Launch())
    return replay(config, init_mesh(config.parallel, "cpu", Launch()), step)


def files(run):
    """Every file and folder of a run, with its time and content."""
    return {
        str(path.relative_to(run)): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(run.rglob("*"))
    }


@pytest.fixture(scope="module")
def made(poison, tmp_path_factory):
    """A run that went back once; it has a checkpoint of every third step."""
    run = tmp_path_factory.mktemp("made") / "run"
    train_here(poison.run(run, "train.guard.max_nonfinite=1"))
    (event,) = events(run, "rollback")
    assert event["steps"] == [poison.step - 1, poison.step]
    return run


def assert_equal_bits(replayed, run, step):
    recorded = rows(run)[step]
    assert replayed.loss.hex() == recorded["loss_hex"]
    assert replayed.grad_norm == recorded["grad_norm"]
    assert [i for pack in replayed.packs for i in pack.ids] == ledger(run)[step]


@pytest.mark.parametrize(
    ("step", "base"),
    [(1, 0), (3, 0), (4, 3), (6, 3), (9, 6), (10, 9), (12, 9), (STEPS, 12)],
    ids=["first", "before_any_save", "right_after_a_save", "between", "behind_the_passed", "next", "at_a_save", "last"],
)
def test_a_step_is_equal_to_the_bit_and_the_run_is_only_read(made, step, base):
    before = files(made)
    replayed = replay_here(made, step)
    assert files(made) == before
    assert replayed.base == base and replayed.reason is None
    assert_equal_bits(replayed, made, step)
    targets = sum(pack.targets for pack in replayed.packs)
    assert targets == sum(rows(made)[step]["target_tokens"].values())
    total = sum(pack.loss * pack.targets for pack in replayed.packs if pack.targets)
    assert total / targets == pytest.approx(replayed.loss, rel=1e-6)


def test_the_pack_with_the_bad_sample_is_named(made, poison):
    """By the real command, of a step that the run has passed over since."""
    done = subprocess.run(
        [str(MMSCALE), "replay", str(made), "--step", str(poison.step)], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout.splitlines()
    assert f"passed over by the run: nonfinite at step {poison.step}" in out
    assert "loss       now nan nan, recorded none" in out
    packs = [line for line in out if line.startswith("pack ")]
    assert len(packs) == 2
    (bad,) = (line for line in packs if "NOT FINITE" in line)
    assert poison.sample in bad.split()
    (good,) = (line for line in packs if line != bad)
    assert poison.sample not in good.split()
    assert f"ids        {len(ledger(made)[poison.step])} samples in 2 packs, equal to the ledger" in out


def test_what_the_command_prints_of_a_sound_step(made):
    done = subprocess.run(
        [str(MMSCALE), "replay", str(made), "--step", "5"], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    recorded = rows(made)[5]
    out = done.stdout.splitlines()
    assert out[0] == "step 5: weights from the checkpoint of step 3; steps done again: 1"
    (loss,) = (line for line in out if line.startswith("loss "))
    assert loss.count(recorded["loss_hex"]) == 2 and loss.endswith(": equal")
    (norm,) = (line for line in out if line.startswith("grad_norm "))
    assert norm.endswith(": equal")


def test_a_step_that_was_skipped_is_not_finite_then_and_now(poison, tmp_path):
    from mmscale.cli.replay import report

    run = tmp_path / "run"
    train_here(poison.run(run, f"train.steps={poison.step + 1}"))
    replayed = replay_here(run, poison.step)
    loss, norm = (line for line in report(replayed) if line.startswith(("loss", "grad_norm")))
    assert loss.endswith("recorded nan nan: not finite then and now") and norm.endswith("not finite then and now")
    assert_equal_bits(replay_here(run, poison.step + 1), run, poison.step + 1)


def test_a_damaged_checkpoint_is_left_alone_and_the_one_before_taken(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made, run)
    file = max((run / "checkpoints/step_00000009").glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    before = files(run)
    replayed = replay_here(run, 10)
    assert files(run) == before
    assert replayed.base == 6
    assert_equal_bits(replayed, made, 10)


@pytest.mark.parametrize("step", [0, -1, STEPS + 1])
def test_steps_that_are_not_on_record_are_refused(made, step):
    with pytest.raises(ConfigError, match=f"--step {step}: .*steps 1 to {STEPS} on record.*give one of them"):
        replay_here(made, step)


def test_a_step_given_up_by_a_rollback_is_not_on_record(made, tmp_path):
    """Its line is still there, but what the run does now leads to another one."""
    run = tmp_path / "run"
    shutil.copytree(made, run)
    text = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    again = max(i for i, line in enumerate(text) if json.loads(line)["step"] == 7)
    (run / "metrics.jsonl").write_text("".join(text[: again + 1]))
    with pytest.raises(ConfigError, match="steps 1 to 7 on record"):
        replay_here(run, 8)


def test_other_data_than_the_ledger_names_is_refused(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made, run)
    text = (run / "config.yaml").read_text()
    ledger_lines = (run / "ledger.jsonl").read_text().splitlines()
    changed = [json.loads(line) for line in ledger_lines]
    for row in changed:
        row["ids"] = [*row["ids"][1:], "train/digits/000000.tar:another"]
    (run / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    with pytest.raises(DataError, match=r"step 5: expected the \d+ samples of .*ledger\.jsonl.* 1 are others"):
        replay_here(run, 5)
    assert (run / "config.yaml").read_text() == text


@pytest.mark.parametrize(
    "words",
    [("parallel.ulysses=2", "parallel.tensor=2", "parallel.tensor_sequence=true"), ("parallel.engine=fsdp",),
     ("parallel.engine=deepspeed", "parallel.zero_stage=3", "parallel.offload_optimizer=true")],
    ids=["divided_packs", "fsdp", "deepspeed"],
)  # fmt: skip
def test_any_layout_is_replayed_on_one_process(made, tmp_path, words):
    from mmscale.config.load import dump_config, load_config

    run = tmp_path / "run"
    shutil.copytree(made, run)
    (run / "config.yaml").write_text(dump_config(load_config(str(made / "config.yaml"), words)))
    assert_equal_bits(replay_here(run, 4), made, 4)


def test_stream_mode_is_refused(made, tmp_path):
    from mmscale.config.env import Launch
    from mmscale.config.load import dump_config, load_config
    from mmscale.train.replay import replay_config

    config = load_config(str(made / "config.yaml"), [])
    words = [f"data.sources.{name}.mode=stream" for name in config.data.sources]
    (tmp_path / "config.yaml").write_text(dump_config(load_config(str(made / "config.yaml"), words)))
    with pytest.raises(ConfigError, match=r"mode: stream.*mmscale-data index"):
        replay_config(tmp_path, Launch())


def test_no_run_is_refused_in_one_line(tmp_path):
    done = subprocess.run(
        [str(MMSCALE), "replay", str(tmp_path / "no"), "--step", "1"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stderr.startswith("ConfigError: "), done.stderr
    assert not (tmp_path / "no").exists()


def test_a_run_of_two_ranks_is_replayed_on_one_and_on_two(poison, tmp_path):
    run = tmp_path / "run"
    steps = poison.step + 2
    for done in on_ranks(2, "train", *poison.run(run, "train.guard.max_nonfinite=1", f"train.steps={steps}")):
        assert done.returncode == 0, done.stderr
    recorded = rows(run)[steps]
    replayed = replay_here(run, steps)
    assert replayed.loss == pytest.approx(recorded["loss"], rel=1e-6)
    assert replayed.grad_norm == pytest.approx(recorded["grad_norm"], rel=1e-5)
    print(f"one rank: relative difference {abs(replayed.loss / recorded['loss'] - 1):.1e}")

    before = files(run)
    first, second = on_ranks(2, "replay", str(run), "--step", str(steps))
    assert (first.returncode, second.returncode, second.stdout) == (0, 0, ""), first.stderr + second.stderr
    assert files(run) == before
    out = first.stdout.splitlines()
    assert [line.rsplit(": ", 1)[-1] for line in out if line.startswith(("loss ", "grad_norm "))] == ["equal", "equal"]
    packs = sorted(line.split(": ", 1)[1].split(", ids ")[1] for line in out if line.startswith("pack "))
    assert packs == sorted(" ".join(pack.ids) for pack in replayed.packs)
