"""Batch scripts against recorded texts, the site file, the start of an attempt."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import get_args

import pytest

from mmscale.cluster.batch import EXPORTED, Kind, Submission, fields_of, main, script_text, start_attempt
from mmscale.cluster.site import Site, read_site
from mmscale.cluster.submit import find_site, plan_job
from mmscale.errors import ConfigError, RefusedInputError
from mmscale.train.attempt import write_json

REPO = Path(__file__).parents[2]
RECORDED = REPO / "tests/slurm/recorded"
RECIPE = str(REPO / "configs/recipes/digits.yaml")

JOB = "JobId=7 JobName=r JobState=RUNNING Restarts=1 SubmitTime=100 EligibleTime=110 StartTime=120 EndTime=720 NodeList=fx[1-2]"

FULL = Site(
    account="acc", partition="gpu", qos="high", constraint="a100&nvlink", nodes=4, gpus_per_node=8, cpus_per_task=64,
    time="2-00:00:00", export="NCCL_DEBUG,WANDB_MODE", sbatch_extra="--exclusive --comment='two words'", lead_s=300,
    procs_per_node=8, venv="/opt/venv", modules="cuda nccl", container="/img.sif", container_runtime="pyxis", mounts="/data:/data",
)  # fmt: skip


def submission(chain: str | None) -> Submission:
    return Submission(
        arguments=("/home/me/my configs/a.yaml", "train.lr=1e-4", "data.root=/a 'b' $HOME \"c\""),
        name="my run",
        folder=Path("/home/me"),
        run_dir=Path("/runs/100% mine"),
        repo=Path("/opt/mmscale"),
        chain=chain,
        site=Path("/home/me/site.env"),
    )


@pytest.mark.parametrize("kind", get_args(Kind))
def test_the_scripts_of_the_repository_are_what_the_renderer_gives(kind: Kind) -> None:
    """After a change: python -m mmscale.cluster.batch render slurm."""
    assert (REPO / f"slurm/{kind}.sbatch").read_text() == script_text(kind, Site())


@pytest.mark.parametrize("chain", [None, "my-run-17"])
def test_a_submission_with_every_option(chain: str | None) -> None:
    recorded = RECORDED / ("chain.sbatch" if chain else "job.sbatch")
    assert script_text("pretrain", FULL, submission(chain)) == recorded.read_text()


@pytest.mark.parametrize("path", [*(REPO / "slurm").rglob("*.s*"), *RECORDED.iterdir()], ids=lambda path: path.name)
def test_bash_can_read_it(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""


def test_arguments_survive_the_shell() -> None:
    line = script_text("pretrain", FULL, submission(None)).splitlines()[-1]
    printed = subprocess.run(
        ["bash", "-c", f'train_job() {{ printf "%s\\n" "$@"; }}; {line}'], capture_output=True, text=True, check=True
    )
    assert tuple(printed.stdout.splitlines()) == submission(None).arguments


def test_no_secret_is_on_the_list_of_exported_variables() -> None:
    assert not [name for name in EXPORTED if any(word in name for word in ("TOKEN", "KEY", "SECRET", "PASS", "ALL"))]


def test_quotes_in_an_option_are_refused() -> None:
    with pytest.raises(ConfigError, match="without quotes"):
        script_text("pretrain", Site(account='a"b'))


@pytest.mark.parametrize(
    ("answers", "restarts", "is_requeued", "num_calls"),
    [
        (["0:"], "0", True, 1),
        (["1:Unable to contact slurm controller (connect failure)", "0:"], "0", True, 2),
        (
            ["1:Unable to contact slurm controller (connect failure)"],
            "1",
            True,
            1,
        ),  # SLURM has done it, and runs the next attempt
        (
            ["143:", "1:Job is pending execution for job 7"],
            "0",
            True,
            2,
        ),  # a signal ended the first call after it had worked
        (["1:Requested operation is presently disabled for job 7"], "0", False, 1),
    ],
)
def test_requeue_asks_again_while_the_controller_is_down(
    tmp_path: Path, answers: list[str], restarts: str, is_requeued: bool, num_calls: int
) -> None:
    """The timing of a real controller's death cannot be had; these are the answers it gave on a real cluster."""
    (tmp_path / "answers").write_text("".join(f"{line}\n" for line in answers))
    (tmp_path / "restarts").write_text(restarts)
    script = """
        ask_controller() { "$@"; }; show_job() { echo "JobId=7 Restarts=$(cat restarts)"; }; field() { sed -n "s/.* $1=\\([^ ]*\\).*/\\1/p"; }
        restarts=0; scontrol() { echo x >>calls; local line; line=$(sed -n "$(wc -l <calls)p" answers); echo "${line#*:}" >&2; return "${line%%:*}"; }
        say() { echo "$*"; }; sleep() { :; }; SLURM_JOB_ID=7; . "$0"; requeue"""
    path = str(REPO / "slurm/lib/requeue.sh")
    done = subprocess.run(["bash", "-c", script, path], cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert (done.returncode == 0) is is_requeued, done.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == num_calls


# ---- the site file


def test_every_line_of_the_example_is_read(tmp_path: Path) -> None:
    """With the comment signs before its settings taken away; bash reads the same values."""
    lines = (REPO / "slurm/site.env.example").read_text().splitlines()
    text = "".join(line.removeprefix("#") + "\n" for line in lines if line[:2] != "# " and "=" in line)
    path = tmp_path / "site.env"
    path.write_text(text)
    site = read_site(path)
    fields = {name: getattr(site, name) for name in Site.__slots__}
    assert None not in fields.values() and fields["sbatch_extra"] == "--exclusive --mem=0" and fields["nodes"] == 2
    for name, value in fields.items():
        shell = subprocess.run(
            ["bash", "-c", f'. "$0"; echo "${name.upper()}"', str(path)], capture_output=True, text=True
        )
        assert shell.stdout.strip() == str(value), name


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("PARTITON=gpu", "did you mean 'PARTITION'"),
        ("NODES=two", "expected NODES to be a number of at least 1, found 'two'"),
        ("NODES=0", "expected NODES to be a number of at least 1"),
        ("TIME=2h", "expected a time as SLURM writes it"),
        ("CONTAINER_RUNTIME=docker", "apptainer or pyxis, found 'docker'"),
        ("VENV=/a b", "found 2 words"),
        ("VENV='/a", "closed quotes"),
        ("VENV=$HOME/v", "write out what the variable stands for"),
        ("rm -rf /", "expected KEY=value"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, line: str, text: str) -> None:
    path = tmp_path / "site.env"
    path.write_text(f"# mine\nACCOUNT=a\n{line}\n")
    with pytest.raises(ConfigError, match=r"site\.env:3: ") as caught:
        read_site(path)
    assert text in str(caught.value)


def test_a_site_file_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"cannot read the site file /nowhere/site\.env"):
        find_site("/nowhere/site.env")


# ---- the start of an attempt


def start(
    run: Path, token: str = "7.1", mode: str = "requeue", submission: str = "7", lead_s: float = 60, queue: str = ""
) -> str:
    told = [JOB, *queue.splitlines()]
    return start_attempt(run, 20, token, mode, submission, lead_s, ["fx1", "fx2"], told)  # type: ignore[arg-type]


def test_the_record_of_an_attempt(tmp_path: Path) -> None:
    assert start(tmp_path).startswith("go ")
    assert json.loads((tmp_path / "attempts/7.1/job.json").read_text()) == {
        "job": "7", "restarts": 1, "name": "r", "nodes": ["fx1", "fx2"], "submitted_at": 100, "eligible_at": 110,
        "started_at": 120, "ends_at": 720, "lead_s": 60, "mode": "requeue", "submission": "7",
    }  # fmt: skip
    assert (tmp_path / "logs").is_dir()


def test_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    (tmp_path / "DONE").touch()
    assert start(tmp_path, lead_s=10_000).startswith("done ")
    assert not (tmp_path / "attempts").exists()


@pytest.mark.parametrize(("done", "word"), [(30, "done"), (20, "done"), (10, "go")])
def test_a_finished_run_goes_on_when_it_is_given_more_steps(tmp_path: Path, done: int, word: str) -> None:
    write_json(tmp_path / "DONE", {"step": done})
    assert start(tmp_path).split()[0] == word
    assert (tmp_path / "DONE").exists() == (word == "done"), "what it says must not end the job after this attempt"


def test_a_run_directory_that_cannot_be_written_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("")
    with pytest.raises(RefusedInputError, match=r"cannot write the run directory .*: File exists; make room"):
        start(tmp_path)


def test_what_was_given_up_is_not_started_again_by_the_same_submission(tmp_path: Path) -> None:
    start(tmp_path, "7.0")
    for name in ("DO_NOT_RESTART", "bad_nodes.json"):
        write_json(tmp_path / name, {"reason": "poison\nstep", "submission": "7"})
    assert start(tmp_path).startswith("stop this run was given up: poison step")
    assert start(tmp_path, "8.0", submission="8").startswith("go ")
    assert not (tmp_path / "DO_NOT_RESTART").exists() and not (tmp_path / "bad_nodes.json").exists()


def test_bad_nodes_are_kept_within_a_submission(tmp_path: Path) -> None:
    start(tmp_path, "7.0")
    write_json(tmp_path / "bad_nodes.json", {"fx2": {"reason": "x", "token": "7.0", "at": 1.0}})
    start(tmp_path)
    assert (tmp_path / "bad_nodes.json").exists()


def test_a_limit_shorter_than_the_lead_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"longer than the 600 s .* found 600 s in job 7"):
        start(tmp_path, lead_s=600)


@pytest.mark.parametrize(
    ("mode", "submission", "queue", "is_refused"),
    [
        ("chain", "c", "7 r\n9 c", True),  # the job that is requeued waits or runs
        ("chain", "c", "9 c", False),  # it has ended
        ("requeue", "9", "7 r\n9 r", False),  # the same mode: the owner token decides
        ("requeue", "7", "7 r", False),  # itself
    ],
)
def test_two_modes_on_one_directory(tmp_path: Path, mode: str, submission: str, queue: str, is_refused: bool) -> None:
    start(tmp_path, "7.0")
    if not is_refused:
        assert (
            start(tmp_path, f"{submission}.1" if submission != "c" else "9.0", mode, submission, queue=queue)[:2]
            == "go"
        )
        return
    with pytest.raises(ConfigError, match=r"job 7 \(mode requeue\) is still in the queue .* `scancel 7`"):
        start(tmp_path, "9.0", mode, submission, queue=queue)


def test_a_job_on_the_directory_of_a_waiting_chain_is_refused(tmp_path: Path) -> None:
    start(tmp_path, "7.0", "chain", "my chain")
    with pytest.raises(ConfigError, match=r"the chain my chain .* `scancel --name='my chain'`"):
        start(tmp_path, "9.0", queue="8 my chain\n9 r")


def test_fields_of_a_job_line() -> None:
    assert fields_of(JOB)["EndTime"] == "720" and "Nothing" not in fields_of(JOB)


def test_the_run_directory_comes_from_the_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", RECIPE, f"run.dir={tmp_path}/a b", "data.root=/data"])
    steps, _, folder = capsys.readouterr().out.partition(" ")
    assert steps.isdecimal() and folder == f"{tmp_path}/a b\n"


# ---- mmscale submit


def test_a_plan_checks_layout_and_time(tmp_path: Path) -> None:
    words = ["data.root=/data", f"run.dir={tmp_path}/r"]
    plan = plan_job(RECIPE, words, Site(nodes=2, time="1-0"), None, None, None)
    assert (
        "#SBATCH --nodes=2\n" in plan.text
        and "#SBATCH --job-name=r\n" in plan.text
        and "PROCS_PER_NODE=1\n" in plan.text
    )
    assert not (tmp_path / "r").exists()
    with pytest.raises(ConfigError, match="6 data-parallel ranks"):
        plan_job(RECIPE, words, Site(nodes=2, procs_per_node=3), None, None, None)
    with pytest.raises(ConfigError, match="found 60 s in the time limit 1"):
        plan_job(RECIPE, words, Site(time="1"), None, None, None)
    with pytest.raises(ConfigError, match="without secrets") as refusal:
        plan_job(RECIPE, [*words, "data.root=https://me:s3cretword@host/data"], Site(), None, None, None)
    assert "s3cretword" not in str(refusal.value)
    chain = plan_job(RECIPE, words, Site(), None, 3, "c")
    assert "--dependency=singleton" in chain.text and "--requeue" not in chain.text and chain.num_jobs == 3
