"""The `mmscale` command: one sub-command per file, each importing what it needs only when it runs."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import traceback
from typing import Annotated

import typer

from mmscale import __version__
from mmscale.config.env import secrets_from_env
from mmscale.errors import MmscaleError
from mmscale.redact import hide, redact

app = typer.Typer(
    name="mmscale",
    help="Trains large multimodal language models from sharded WebDataset tars. Data tools: mmscale-data --help.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/recipes/digits.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides such as train.lr=1e-4; keys: docs/configuration.md."),
]


def _run(module: str, *arguments: object) -> None:
    """Calls `run` of one sub-command's module."""
    importlib.import_module(f"mmscale.cli.{module}").run(*arguments)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"mmscale {__version__}")
        raise typer.Exit


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train: alone, under srun, or by `torchrun --nproc-per-node 2 --no-python mmscale train CONFIG`.

    Starting the same run.dir again resumes from the newest checkpoint that verifies. SIGTERM and SIGUSR1 save at the next
    step and exit 0. Exit codes: 0 finished or stopped after saving, 2 refused input, 1 anything else.
    """
    _run("train", config, overrides or [])


@app.command()
def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    nnodes: Annotated[int, typer.Option(min=1, help="Nodes of the run.")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="Number of this node, from 0.")] = 0,
    nproc_per_node: Annotated[int, typer.Option(min=1, help="Processes on each node; one per GPU.")] = 1,
    master_addr: Annotated[str | None, typer.Option(help="Address of node 0; needed with several nodes.")] = None,
    master_port: Annotated[int | None, typer.Option(help="Free TCP port there; needed with several nodes.")] = None,
) -> None:
    """Start and watch the training processes of one node: checks the node, names dead and hung ones, hands signals on.

    Job scripts start one per node. Exit codes: 0 all processes ended well, 2 refused input, 1 anything else.
    """
    _run("launch", config, overrides or [], nnodes, node_rank, nproc_per_node, master_addr, master_port)


@app.command()
def check(
    config: ConfigFile,
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option(min=1, help="Number of processes to check the layout for.")] = 1,
    ranks_per_node: Annotated[
        int, typer.Option(min=1, help="Processes on one machine, for what crosses the network.")
    ] = 8,
    device_gb: Annotated[
        float | None, typer.Option(help="Memory of one device in GB: says whether the run fits.")
    ] = None,
) -> None:
    """Validate a config and print its layout, memory and traffic per process, and parameters; exit 2 and one line when it is bad.

    No process group is made and no weight is read, so that 1024 GPUs can be planned on a laptop.
    """
    _run("check", config, overrides or [], world_size, ranks_per_node, device_gb)


@app.command()
def consolidate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT", help="Run directory (its newest verified checkpoint) or one checkpoint."
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="New folder for the Hugging Face model.")],
    target: Annotated[
        str, typer.Option(help="auto: stock LLaVA when everything fits, else mmscale's class; llava; mmscale.")
    ] = "auto",
    drop: Annotated[list[str] | None, typer.Option(help="Leave a modality out: audio.")] = None,
    dtype: Annotated[str, typer.Option(help="Stored type: fp32, bf16.")] = "fp32",
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest safetensors file in GB.")] = 4.0,
    proof: Annotated[
        bool, typer.Option("--proof/--no-proof", help="Compare logits; needs memory for the whole model in fp32.")
    ] = True,
) -> None:
    """Turn a checkpoint into a Hugging Face folder, reload it in a fresh process and compare logits before saying ok."""
    _run("consolidate", source, out, target, drop or [], dtype, max_shard_gb, proof)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder written by mmscale consolidate.")],
    prompt: Annotated[
        str, typer.Option(help="The question; media go in front of it unless it holds <image> or <audio>.")
    ],
    image: Annotated[list[str] | None, typer.Option(help="Image file; may be repeated.")] = None,
    audio: Annotated[list[str] | None, typer.Option(help="Audio file; may be repeated.")] = None,
    video: Annotated[list[str] | None, typer.Option(help="Video file; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 64,
    device: Annotated[str, typer.Option(help="torch device.")] = "cpu",
) -> None:
    """Answer one question with an exported model (greedy)."""
    _run("generate", model, prompt, image or [], audio or [], video or [], max_new_tokens, device)


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder written by mmscale consolidate.")],
    data: Annotated[list[str], typer.Argument(metavar="DATASET...", help="Dataset folders (with manifest.json).")],
    out: Annotated[
        str | None, typer.Option(help="JSON-lines file for question, answer and truth of every row.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 16,
    modalities: Annotated[
        str, typer.Option(help="Ask only rows whose media are all among these: image,audio,video.")
    ] = "image,audio,video",
    device: Annotated[str, typer.Option(help="torch device.")] = "cpu",
) -> None:
    """Ask an exported model the first question of every row and print exact match per task."""
    _run("evaluate", model, data, out, batch_size, max_new_tokens, modalities.split(","), device)


@app.command(name="submit")
def submit_job(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option("-N", "--nodes", min=1, help="Nodes.")] = None,
    time: Annotated[
        str | None, typer.Option("-t", "--time", help="Time limit as SLURM writes it: 48:00:00, 2-0.")
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs of a node; one process each.")] = None,
    procs_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes of a node, when not one per GPU.")
    ] = None,
    cpus_per_task: Annotated[int | None, typer.Option("-c", "--cpus-per-task", min=1, help="CPUs of a node.")] = None,
    account: Annotated[str | None, typer.Option("-A", "--account", help="Account that pays.")] = None,
    partition: Annotated[str | None, typer.Option("-p", "--partition", help="Partition.")] = None,
    qos: Annotated[str | None, typer.Option("-q", "--qos", help="Quality of service.")] = None,
    constraint: Annotated[str | None, typer.Option("-C", "--constraint", help="Features of the nodes.")] = None,
    lead: Annotated[
        int | None, typer.Option(min=1, help="Seconds before the time limit at which the run saves.")
    ] = None,
    chain: Annotated[
        int | None, typer.Option(min=1, help="This many jobs one after another, instead of one that is requeued.")
    ] = None,
    name: Annotated[str | None, typer.Option("-J", "--job-name", help="Default: that of the run directory.")] = None,
    site: Annotated[str | None, typer.Option(help="File like slurm/site.env.example; default MMSCALE_SITE.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script and submit nothing.")] = False,
) -> None:
    """Submit a run to SLURM: it saves before the time limit, is requeued, resumes, and stops when it is finished."""
    options = {
        "nodes": nodes, "time": time, "gpus_per_node": gpus_per_node, "procs_per_node": procs_per_node,
        "cpus_per_task": cpus_per_task, "account": account, "partition": partition, "qos": qos, "constraint": constraint,
        "lead_s": lead,
    }  # fmt: skip
    _run("submit", config, overrides or [], options, chain, name, site, dry_run)


@app.command()
def replay(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory; it is only read.")],
    step: Annotated[int, typer.Option(min=1, help="Step that the run has done.")],
) -> None:
    """Do one step of a run again: its batch, the weights before it, the loss of each pack, against what was recorded.

    One process will do for any run that fits into it; started like `mmscale train`, it takes the layout of the run.
    """
    _run("replay", run, step)


RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="Run directory (`run.dir`).")]


@app.command()
def status(
    run: RunFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Say how a run stands: attempts, progress, where the time went, the last error, and what to do next."""
    _run("status", run, as_json)


@app.command()
def report(
    run: RunFolder,
    out: Annotated[str | None, typer.Option(help="Folder for report.html and report.png; default: RUN/report.")] = None,
) -> None:
    """Draw a run: loss, throughput, fill, data wait, goodput, attempts and events, as one HTML file and a PNG."""
    _run("report", run, out)


@app.command()
def demo(
    folder: Annotated[
        str, typer.Argument(help="Folder for data, run and exports; an earlier demo there is replaced.")
    ] = "demo",
) -> None:
    """Do the main job on real data on a CPU: build shards, train, stop and resume, consolidate, ask, report."""
    _run("demo", folder)


def main() -> None:
    """Runs the command; mmscale's own errors become one line and their exit code. No secret of the environment is printed."""
    hide(secrets_from_env())
    try:
        app(standalone_mode=True)
    except MmscaleError as error:
        print(redact(f"{type(error).__name__}: {error}"), file=sys.stderr)
        _leave(error.exit_code)
    except Exception:
        print(redact(traceback.format_exc()), file=sys.stderr)
        _leave(1)


def _leave(code: int) -> None:
    """Ends the process. The thread that makes packs ahead may still wait for other ranks: where its wait ended while Python
    takes itself down, C++ would abort, and the code were lost."""
    if any(thread.name == "ahead" for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
