"""From a config to a run that is ready for its next step: mesh, data, model, engine, resume point."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import mmscale
from mmscale import logging
from mmscale.config.checks import check_config, check_lengths
from mmscale.config.cost import run_cost
from mmscale.config.identity import identity_changes
from mmscale.config.layouts import check_degrees
from mmscale.config.llm import llm_sizes
from mmscale.config.load import dump_config, load_config
from mmscale.config.mixture import is_stream_mode
from mmscale.config.schema import Config, CostConfig, ParallelConfig, SourceConfig, TrainConfig
from mmscale.config.specs import extra_tokens, media_specs
from mmscale.errors import CheckpointError, ConfigError, RefusedInputError, SaveError
from mmscale.kernels.attention.select import explain
from mmscale.model.composite import build_model
from mmscale.model.llm.attention import check_positions
from mmscale.parallel.apply import external_parts, make_engine
from mmscale.parallel.comm import all_gather_objects, broadcast_object, on_main, sum_ints
from mmscale.parallel.engines.base import Engine
from mmscale.parallel.layout import ShardLayout
from mmscale.parallel.mesh import Mesh
from mmscale.parallel.share import Sharing
from mmscale.parallel.sp.choose import resolve_layout
from mmscale.parallel.sp.media import tower_inputs
from mmscale.parallel.sp.split import divide
from mmscale.parallel.tensor.shard import shard_tensor
from mmscale.streaming.lengths import Turn
from mmscale.streaming.loader import Stream
from mmscale.streaming.make_pack import Divide
from mmscale.streaming.protocol import DataState, DataStream
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.streaming.unindexed.stream import UnindexedStream
from mmscale.train.attempt import Attempt, sync_folder, write_json, write_text
from mmscale.train.checkpoint import CheckpointReader, find_checkpoint
from mmscale.train.flops import FlopModel, flop_model
from mmscale.train.heartbeat import clear_beats
from mmscale.train.optim import ParamGroup, build_optimizer, param_groups
from mmscale.train.rollback import PassedOver, read_passed_over
from mmscale.types import MediaSpecs

log = logging.get_logger(__name__)

DONE = "DONE"
_JOIN_EVERY_S = 20.0


@dataclass(frozen=True)
class Run:
    """Everything a step needs.

    `first_step`: the next optimizer step (1 = a new run). `state`: the data state before it, None = the beginning. `external`: path and sha256 of
    the frozen parts whose weights checkpoints leave out. `passed_over`: steps whose batch is consumed without an update.
    """

    config: Config
    mesh: Mesh
    sharing: Sharing
    stream: DataStream
    eval_stream: Stream | None
    engine: Engine
    groups: Sequence[ParamGroup]
    flops: FlopModel
    first_step: int
    state: DataState | None
    external: Mapping[str, Mapping[str, str]]
    passed_over: PassedOver

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.config.run.dir)


@contextmanager
def open_run(config: Config, mesh: Mesh, attempt: Attempt) -> Iterator[Run | None]:
    """A run at its resume point; None when the run directory says that all steps are done.

    Raises:
        ConfigError: keys that do not fit each other, the model or the number of processes.
        RefusedInputError: data that is missing or empty.
        CheckpointError: checkpoints exist but none is whole, or they belong to another model or other data.

    Distributed: every rank calls it.
    """
    check_config(config, mesh.world_size)
    _set_torch(config)
    if on_main(mesh, lambda: _is_done(config)):  # each rank's own look might differ
        yield None
        return
    on_main(mesh, lambda: _check_same_run(config))
    run = _assemble(config, mesh, lambda: _take_over(config, mesh, attempt))
    try:
        on_main(mesh, lambda: _prepare_folder(config, attempt))
        _print_header(run)
        yield run
    finally:
        run.engine.close()


@contextmanager
def open_again(config: Config, mesh: Mesh, reader: CheckpointReader | None) -> Iterator[Run]:
    """A run as it stood after the checkpoint `reader` (None = at its beginning), to look at: nothing is claimed or written there.

    Raises what `open_run` raises. Distributed: every rank calls it.
    """
    check_config(config, mesh.world_size)
    _set_torch(config)
    run = _assemble(config, mesh, lambda: reader)
    try:
        yield run
    finally:
        run.engine.close()


def mark_done(run: Run, attempt: Attempt) -> None:
    """Writes DONE, last of all: it wins over every request to go on.

    Raises:
        FencedError: another attempt owns the run, which may have been given more steps.
        SaveError: the disk refuses.

    Distributed: every rank calls it.
    """
    on_main(run.mesh, lambda: _write_done(run.folder, run.config.train.steps, attempt))
    log.info("done: %d steps; next: mmscale consolidate %s OUT", run.config.train.steps, run.folder)


def _write_done(folder: Path, steps: int, attempt: Attempt) -> None:
    attempt.check_owner()
    try:
        write_json(folder / DONE, {"step": steps})
        sync_folder(folder)
    except OSError as error:
        raise SaveError(
            f"expected to write {folder / DONE} after the last step, found {type(error).__name__}: {error}; make room or fix the "
            "permissions and start again: nothing is left to train"
        ) from error


def _is_done(config: Config) -> bool:
    marker = Path(config.run.dir) / DONE
    if not marker.exists():
        return False
    try:
        step = int(json.loads(marker.read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s); the checkpoints say where the run stands", marker, error)
        return False
    if step < config.train.steps:
        log.info("%s says %d steps; train.steps=%d, so the run goes on", marker, step, config.train.steps)
        return False
    log.info(
        "%s: all %d steps are done; to train on, raise train.steps; to start anew, choose another run.dir", marker, step
    )
    return True


def _set_torch(config: Config) -> None:
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    torch.use_deterministic_algorithms(config.train.deterministic)


def _prepare_folder(config: Config, attempt: Attempt) -> None:
    """Writes the resolved config into the run directory and takes away what earlier attempts have said there.

    Raises FencedError when another attempt has taken over while this one loaded: it would lose its heartbeats, and be taken for hung.
    """
    folder = Path(config.run.dir)
    attempt.check_owner()
    try:
        (folder / DONE).unlink(missing_ok=True)
        clear_beats(folder)
        write_text(folder / "config.yaml", dump_config(config))
    except OSError as error:
        raise RefusedInputError(
            f"cannot write the run directory {folder}: {error.strerror}; set run.dir to a folder you may write"
        ) from error


def _assemble(config: Config, mesh: Mesh, choose: Callable[[], CheckpointReader | None]) -> Run:
    """The run as it stands after the checkpoint that `choose` gives; None = at its beginning."""
    _kernel_text(config, mesh)  # refused before the seconds of the rest
    tokenizer = load_tokenizer(config)
    specs = media_specs(config.model, config.data)
    cost = run_cost(config, specs, tokenizer.vocab_size)
    sharing = open_sharing(config.parallel, mesh, specs, cost)
    opening = _Opening(config, tokenizer, specs, cost, sharing)
    stream = _training_stream(opening)
    eval_stream = _open_stream(opening, config.eval.sources) if config.eval.every else None
    model = build_model(config, tokenizer.vocab_size, specs)
    check_lengths(config, specs, getattr(model.llm.config, "max_position_embeddings", None))
    check_positions(model.llm.config, config.data.seq_len)
    if mesh.replica.size > 1:  # with the defaults of the family's configuration
        check_degrees(config.parallel, llm_sizes(model.llm.config.to_dict()), config.data.seq_len)
    flops = flop_model(model.config, _trained_parts(config.train), checkpointed=config.train.checkpoint_activations)
    layouts: Mapping[str, ShardLayout] = {}
    if mesh.tensor.size > 1:
        layouts = shard_tensor(model, mesh, config.parallel)
    groups = param_groups(model, config.train)
    external = external_parts(config.model, config.train)
    hashes = broadcast_object(
        mesh, {name: weights_sha256(path) for name, path in external.items()} if mesh.is_main else {}
    )
    reader = choose()
    # before the engine: a checkpoint of other data or weights is refused without the work of loading it
    state = None if reader is None else stream.restore(reader.trainer["data"])
    if reader is not None:
        _check_external(reader, external, hashes)
    engine = make_engine(
        model, build_optimizer(groups, config.train), config.parallel, config.train, mesh, external, reader, layouts
    )
    first_step = 1 if reader is None else reader.step + 1
    sources = {name: {"path": path, "sha256": hashes[name]} for name, path in external.items()}
    passed_over = on_main(mesh, lambda: read_passed_over(Path(config.run.dir)))
    return Run(
        config, mesh, sharing, stream, eval_stream, engine, groups, flops, first_step, state, sources, passed_over
    )


def _take_over(config: Config, mesh: Mesh, attempt: Attempt) -> CheckpointReader | None:
    """Makes this attempt the owner of the run directory, and gives the checkpoint from which it goes on.

    It comes late, so that a start that is refused leaves the directory, and whoever works there, alone.
    """
    on_main(mesh, attempt.claim)
    reader = find_checkpoint(Path(config.run.dir) / "checkpoints", mesh, attempt)
    on_main(mesh, lambda: attempt.started(0 if reader is None else reader.step, mesh.world_size))
    return reader


def _check_same_run(config: Config) -> None:
    """Refuses a run directory in which another run has trained, unless `run.accept_changes` says to go on."""
    folder = Path(config.run.dir)
    saved = folder / "config.yaml"
    if not (saved.exists() and (folder / "metrics.jsonl").exists()):
        return
    try:
        before = load_config(str(saved), [])
    except ConfigError as error:  # written by a version with other keys
        log.warning("%s cannot be compared with the config given now: %s", saved, error)
        return
    changes = identity_changes(before, config)
    if not changes:
        return
    text = "; ".join(changes[:5]) + (f" and {len(changes) - 5} more" if len(changes) > 5 else "")
    if not config.run.accept_changes:
        raise ConfigError(
            f"run.dir={folder}: expected the settings with which this run was begun, found {text}; choose another run.dir, or set "
            "run.accept_changes=true to go on with the new ones"
        )
    log.warning("%s goes on with other settings: %s", folder, text)


def weights_sha256(folder: str) -> str:
    """The digest of all weight files of a Hugging Face folder, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".bin")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _check_external(reader: CheckpointReader, external: Mapping[str, str], hashes: Mapping[str, str]) -> None:
    """Refuses frozen parts with other weights than those beside which the checkpoint was trained."""
    saved = reader.trainer["external_parts"]
    for name, path in external.items():
        if name in saved and saved[name]["sha256"] != hashes[name]:
            raise CheckpointError(
                f"model.{name}.path={path}: expected the weights that this run was trained beside ({saved[name]['path']}, sha256 "
                f"{saved[name]['sha256'][:12]}), found others ({hashes[name][:12]}); restore them, or start a new run.dir"
            )


def load_tokenizer(config: Config) -> TextTokenizer:
    """The run's tokenizer with its added tokens and padded vocabulary."""
    section = config.model.tokenizer
    return TextTokenizer.load(section.path, (*section.add_tokens, *extra_tokens(config.data)), section.pad_to_multiple)


def open_sharing(parallel: ParallelConfig, mesh: Mesh, specs: MediaSpecs, cost: CostConfig) -> Sharing:
    """How the packs of a run come to the ranks of a replica. Raises ConfigError when `parallel.sp` should be decided and is not."""
    if parallel.sp == "auto" and mesh.sequence.size > 1:
        raise ConfigError(
            f"parallel.sp: a kind is expected where {mesh.sequence.size} ranks share a pack already, found 'auto'; start the run with "
            "`mmscale train`, which decides it before it makes the mesh, or set parallel.sp"
        )
    kind = "exchange" if parallel.sp == "auto" else parallel.sp
    return Sharing(mesh, tower_inputs(specs, cost), kind, parallel.attention)


@dataclass(frozen=True)
class _Opening:
    """What the streams of a run are opened with."""

    config: Config
    tokenizer: TextTokenizer
    specs: MediaSpecs
    cost: CostConfig
    sharing: Sharing

    @property
    def divide(self) -> Divide | None:
        """How packs are planned for the sequence ranks; None when there is one."""
        mesh, layout = self.sharing.mesh, resolve_layout(self.config.parallel)
        if mesh.sequence.size == 1:
            return None
        return partial(divide, ulysses=mesh.ulysses.size, ring=mesh.ring.size, layout=layout)


def _training_stream(opening: _Opening) -> DataStream:
    """The training data, indexed or in stream mode."""
    config, mesh = opening.config, opening.sharing.mesh
    sources = config.data.sources
    if not is_stream_mode("data.sources", sources):
        return _open_stream(opening, sources)
    return UnindexedStream.open(
        config.data, sources, opening.tokenizer, opening.specs, global_batch=config.train.global_batch, dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size, workers=config.data.workers, exchange=partial(all_gather_objects, mesh),
    )  # fmt: skip


def _open_stream(opening: _Opening, sources: Mapping[str, SourceConfig]) -> Stream:
    """The stream of some sources; the ranks share the work of computing lengths that are not stored yet."""
    config, mesh = opening.config, opening.sharing.mesh
    together = _Together(mesh)
    stream = Stream.open(
        config.data, sources, opening.tokenizer, opening.specs, cost=opening.cost, global_batch=config.train.global_batch,
        dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, workers=config.data.workers,
        turn=Turn(mesh.rank, mesh.world_size, together.still_working),
        divide=opening.divide, member=opening.sharing.member,
    )  # fmt: skip
    together.wait()
    _check_same_data(mesh, stream.facts.digests())
    return stream


def _trained_parts(train: TrainConfig) -> list[str]:
    """Names of the parts that are trained."""
    return sorted(name for name, part in train.parts if part is not None and part.tune != "frozen")


def _check_same_data(mesh: Mesh, digests: Mapping[str, str]) -> None:
    """Refuses ranks that see different data: each plans for itself, and they must come to the same plan.

    Raises:
        RefusedInputError: on all ranks, with what differs.
    """
    own = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    if len(set(all_gather_objects(mesh, own))) == 1:
        return
    by_rank = all_gather_objects(mesh, dict(digests))
    first = by_rank[0]
    differing = sorted({part for found in by_rank for part in {*first, *found} if first.get(part) != found.get(part)})
    ranks = ", ".join(str(rank) for rank, found in enumerate(by_rank) if found != first)
    raise RefusedInputError(
        f"data.sources: expected the same data on all ranks, found other {', '.join(differing)} on rank {ranks} than on rank 0; "
        "give all nodes the same data.root and the same version of mmscale"
    )


class _Together:
    """Lets ranks wait for each other longer than a collective may take: those that still work join in now and then."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh, self._joined = mesh, time.monotonic()

    def still_working(self) -> None:
        """Call it often; it joins the others every `_JOIN_EVERY_S`."""
        if time.monotonic() - self._joined > _JOIN_EVERY_S:
            sum_ints(self._mesh, [1])
            self._joined = time.monotonic()

    def wait(self) -> None:
        """Returns when every rank has come here."""
        while sum_ints(self._mesh, [0]) != [0]:
            pass


def _commit() -> str:
    """The commit of the source tree that runs, or nothing for an installed package."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(mmscale.__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git on this machine
        return ""
    return f" ({done.stdout.strip()})" if done.returncode == 0 else ""


def _print_header(run: Run) -> None:
    config, mesh = run.config, run.mesh
    train = config.train
    log.info("mmscale %s%s, torch %s, %s", mmscale.__version__, _commit(), torch.__version__, mesh.device)
    log.info("run %s; the resolved config is config.yaml there", run.folder)
    log.info(
        "%d processes: %s, engine %s; %d packs of %d tokens per step = %d tokens",
        mesh.world_size, _grid_text(run), type(run.engine).__name__, train.global_batch, config.data.seq_len,
        train.global_batch * config.data.seq_len,
    )  # fmt: skip
    log.info("%s", _kernel_text(config, mesh))
    if mesh.tensor.size > 1:
        log.info("tensor parallelism divides the language model; the numbers of parameters are those of one rank")
    for group in run.groups:
        log.info(
            "train %-17s %12s parameters, peak lr %.1e, weight decay %g",
            group.part,
            f"{group.size:,}",
            group.lr,
            group.weight_decay,
        )
    if run.first_step > 1:
        log.info("resumed after step %d of %d", run.first_step - 1, train.steps)


def _grid_text(run: Run) -> str:
    """The degrees, and how the sequence ranks work together."""
    mesh, parallel = run.mesh, run.config.parallel
    if mesh.replica.size == 1:
        return f"{mesh.dp_size} data-parallel"
    degrees = f"tensor {mesh.tensor.size} x ulysses {mesh.ulysses.size} x ring {mesh.ring.size} x data {mesh.dp_size}"
    if mesh.ring.size == 1:
        return degrees
    return f"{degrees} (keys by {run.sharing.kind}, tokens {resolve_layout(parallel)})"


def _kernel_text(config: Config, mesh: Mesh) -> str:
    """Which attention kernel is used, and why. Raises ConfigError when the configured one cannot be."""
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    name = config.parallel.attention
    try:
        return explain(name, mesh.device, dtype)
    except ValueError as error:
        raise ConfigError(f"parallel.attention={name}: {error}; use 'auto' or another kernel") from error
