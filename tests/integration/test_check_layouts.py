"""`mmscale check` on layouts of many ranks: what it prints, and what it refuses in one line."""

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mmscale.cli.main import app
from mmscale.config.load import load_config
from mmscale.errors import ConfigError
from mmscale.parallel.mesh import Axis, Mesh
from mmscale.train.job import Job
from mmscale.train.setup import open_run

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = CONFIGS / "recipes/digits.yaml"
TINY = ["data.plan_group=8", "train.global_batch=8"]


def check(recipe, demo_data, tmp_path, *words):
    command = ["check", str(recipe), f"data.root={demo_data}", f"run.dir={tmp_path / 'run'}", *map(str, words)]
    return CliRunner().invoke(app, command, env={"COLUMNS": "200"})


def figures(output, table):
    """Name -> (first number, last cell) of the rows of a printed table."""
    found, inside = {}, False
    for line in output.splitlines():
        inside = table in line if line.startswith("┃") else inside
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if inside and line.startswith("│"):
            found[cells[0]] = (float(cells[1].replace(",", "")), cells[-1])
    return found


def test_check_prints_grid_memory_and_bytes(demo_data, tmp_path):
    degrees = ["parallel.tensor=2", "parallel.ulysses=2", "parallel.ring=2", "parallel.sp=gather"]
    result = check(DIGITS, demo_data, tmp_path, *TINY, *degrees, "--world-size", 16, "--ranks-per-node", 4)
    assert result.exit_code == 0, (result.output, result.exception)
    for text in (
        "16 = tensor 2 x ulysses 2 x ring 2 x data 2",
        "tensor 0 1; ulysses 0 2; ring 0 4; data 0 8; gradients 0 2 4 .. 14 (8); 4 nodes of 4",
        "deepspeed, ZeRO-1, fp32, over 8 ranks",
        "gather over 2 ranks, layout planned",
        "on each of 4 ranks",
    ):
        assert text in result.output, result.output
    held, sent = figures(result.output, "memory of one rank"), figures(result.output, "sent by one rank")
    assert held["all"][0] == pytest.approx(sum(size for name, (size, _) in held.items() if name != "all"), abs=0.01)
    where = {name: place for name, (_, place) in sent.items()}
    assert where["tensor"] == where["ulysses"] == "inside a node"
    assert where["gather"] == "over 2 nodes" and where["gradients"] == "over 4 nodes"
    assert set(where) >= {"media", "share", "weights"}
    assert not (tmp_path / "run").exists()


def test_one_process_sends_nothing(demo_data, tmp_path):
    result = check(DIGITS, demo_data, tmp_path)
    assert result.exit_code == 0 and "sent by one rank" not in result.output
    assert figures(result.output, "memory of one rank")["all"][0] > 0


def test_sp_auto_says_what_it_takes_and_why(demo_data, tmp_path):
    result = check(DIGITS, demo_data, tmp_path, "parallel.sp=auto", "--world-size", 8)
    assert result.exit_code == 0, (result.output, result.exception)
    # a batch of two packs leaves room for two data-parallel ranks, so four share a pack, as many as there are heads
    assert "8 = tensor 1 x ulysses 4 x ring 1 x data 2" in result.output, result.output
    assert "do not divide train.global_batch=2" in " ".join(re.findall(r"[^\s│]+", result.output))


@pytest.mark.parametrize(("recipe", "share"), [("long-8b", "16384 on each of 64"), ("long-70b", "65536 on each of 16")])
def test_a_thousand_gpus_are_planned_on_paper(demo_data, tmp_path, recipe, share):
    result = check(CONFIGS / f"recipes/{recipe}.yaml", demo_data, tmp_path, "--world-size", 1024, "--device-gb", 80)
    assert result.exit_code == 0, (result.output, result.exception)
    assert share in result.output and "of 90% of a device, fits" in result.output
    small = check(CONFIGS / f"recipes/{recipe}.yaml", demo_data, tmp_path, "--world-size", 1024, "--device-gb", 16)
    assert "of 90% of a device, does not fit" in small.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["parallel.tensor=3", "--world-size", 3],
            "parallel.tensor=3 must divide the 4 attention heads.*set it to 2 or 4",
        ),
        (["parallel.ulysses=8", "--world-size", 8], "parallel.ulysses=4 and parallel.ring=2"),
        (["parallel.ring=4", "--world-size", 6], "start 4 or 8 processes.*parallel.ring=(3|6)"),
        (["parallel.deepspeed=nowhere.json", "--world-size", 2], "no file nowhere.json"),
        (["parallel.engine=fsdp", "parallel.zero_stage=3", "--world-size", 2], "engine=fsdp.*zero_stage=3"),
        # 3 and 6 divide the processes but not the 4 heads
        (["parallel.tensor=4", "--world-size", 6], "nearest layout for 6: parallel.tensor=2; parallel.tensor=1$"),
        (["parallel.offload_optimizer=true"], "offload_optimizer=True is DeepSpeed's, found one process"),
        (
            [
                "parallel.tensor=2",
                "parallel.tensor_sequence=true",
                "model.llm.config.model_type=mixtral",
                "--world-size",
                2,
            ],
            "tensor_sequence=true needs a language model without experts",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_nearest_that_can(demo_data, tmp_path, words, expected):
    result = check(DIGITS, demo_data, tmp_path, *words)
    assert isinstance(result.exception, ConfigError) and result.exception.exit_code == 2, result.output
    assert re.search(expected, str(result.exception)) and "\n" not in str(result.exception)


def test_a_deepspeed_file_that_contradicts_or_is_not_deepspeed_s_is_refused(demo_data, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"gradient_clipping": 5.0, "zero_optimization": {"stage": 2}}')
    result = check(DIGITS, demo_data, tmp_path, f"parallel.deepspeed={file}", "--world-size", 2)
    assert isinstance(result.exception, ConfigError) and "gradient_clipping=5.0 contradicts train.clip" in str(
        result.exception
    )
    file.write_text('{"zero_optimization": {"stage": 2, "nope": 1}}')
    result = check(DIGITS, demo_data, tmp_path, f"parallel.deepspeed={file}", "--world-size", 2)
    assert re.search("that DeepSpeed takes is expected, found: .* nope ", str(result.exception)), result.exception
    assert isinstance(result.exception, ConfigError) and "\n" not in str(result.exception)
    file.write_text('{"gradient_clipping": "auto", "zero_optimization": {"stage": 2}}')
    result = check(DIGITS, demo_data, tmp_path, f"parallel.deepspeed={file}", "--world-size", 2)
    assert "deepspeed, ZeRO-2" in result.output


def start_a_run(demo_data, tmp_path, *words):
    """What the start of a run raises, on rank 0 of two ranks of a ring that are not there."""
    mesh = Mesh(
        0, 2, 0, 1, torch.device("cpu"), ring=Axis(0, 2), sequence=Axis(0, 2), replica=Axis(0, 2), grads=Axis(0, 2)
    )
    config = load_config(DIGITS, [f"data.root={demo_data}", f"run.dir={tmp_path / 'run'}", "parallel.ring=2", *words])
    with pytest.raises(ConfigError) as refusal, open_run(config, mesh, Job.of(config).attempt):
        pass
    assert not (tmp_path / "run").exists()
    return str(refusal.value)


def test_a_run_refuses_at_its_start_what_check_refuses(demo_data, tmp_path):
    """Before a step and before anything is written; a window may be the family's default, in no file."""
    words = ["parallel.sp=ring", "model.llm.config.model_type=gpt_oss"]
    checked = check(DIGITS, demo_data, tmp_path, "parallel.ring=2", *words, "--world-size", 2)
    assert start_a_run(demo_data, tmp_path, *words) == str(checked.exception)
    assert "a sliding window (model.llm: 128 tokens" in str(checked.exception)


def test_a_kernel_that_cannot_be_used_leaves_the_run_directory_alone(demo_data, tmp_path):
    assert "parallel.attention=torch_flash" in start_a_run(demo_data, tmp_path, "parallel.attention=torch_flash")
