"""Stream mode for real: over HTTP and commands, the same documents as with an index, and a training run that is stopped,
killed and gone on with."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from mmscale.config.load import load_config
from mmscale.config.schema import SourceConfig
from mmscale.config.specs import media_specs
from mmscale.errors import ConfigError, DataError
from mmscale.streaming.shards import ShardSet
from mmscale.streaming.unindexed.progress import Progress, place_of
from mmscale.streaming.unindexed.stream import UnindexedStream

RECIPE = Path(__file__).parents[2] / "configs/recipes/digits.yaml"
STEPS = 10
SMALL = [
    f"train.steps={STEPS}", "train.save_every=3", "train.warmup_steps=2", "train.global_batch=2", "data.plan_group=2", "data.seq_len=384",
    "eval.every=0", "run.tensorboard=false", "run.threads=1", "model.llm.config.num_hidden_layers=1",
    "model.vision.config.num_hidden_layers=1", "model.audio.config.encoder_layers=1",
]  # fmt: skip
SOURCES = sorted(load_config(str(RECIPE), []).data.sources)
STREAMED = [f"data.sources.{name}.mode=stream" for name in SOURCES]


def config_of(data, *more):
    return load_config(str(RECIPE), [f"data.root={data}", *SMALL, *STREAMED, *more])


def open_stream(data, sources=None, workers=0, **options):
    from mmscale.train.setup import load_tokenizer

    config = config_of(data)
    section = config.data.model_copy(update=options)
    return UnindexedStream.open(
        section, sources or section.sources, load_tokenizer(config), media_specs(config.model, section), global_batch=2,
        dp_rank=0, dp_size=1, workers=workers, exchange=lambda report: [report],
    )  # fmt: skip


def take(stream, num_steps):
    steps = stream.steps()
    try:
        return [next(steps) for _ in range(num_steps)]
    finally:
        steps.close()


def test_documents_and_ids_are_those_of_the_indexed_sources(demo_data):
    """Text, pictures, clips and sound: what a document holds does not depend on how it was read."""
    stream = open_stream(demo_data)
    expected = {}
    for source in stream.sources:
        shards = ShardSet.open(demo_data / "train" / source.name, f"train/{source.name}")
        rows = (shards.read(row) for row in range(len(shards)))
        expected.update({sample.id: (source.encoder, sample) for sample in rows})
    seen, modalities = set(), Counter()
    for batch in take(stream, 12):
        for pack in batch.packs:
            for number, (sample_id, end) in enumerate(zip(pack.ids, pack.cu_seqlens[1:].tolist(), strict=True)):
                encoder, sample = expected[sample_id]
                document = encoder.encode(sample)
                assert torch.equal(pack.input_ids[end - len(document) : end], document.input_ids)
                seen.add(sample_id)
                for item in document.media:
                    media = pack.media[item.modality]
                    at = (media.document == number) & (media.slot == end - len(document) + item.slot)
                    i = at.nonzero().item()
                    start = int(media.num_inputs[:i].sum())
                    assert torch.equal(media.data[start : start + len(item.data)], item.data)
                    modalities[item.modality] += 1
    assert len(seen) > 60 and all(modalities[m] > 3 for m in ("image", "audio"))


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder; `broken` names those whose next answers break off in the middle."""

    broken: ClassVar[Counter[str]] = Counter()

    def do_GET(self):
        name = Path(self.path.partition("?")[0]).name
        if not self.broken[name]:
            return super().do_GET()
        self.broken[name] -= 1
        data = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.close_connection = True
        return None

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(demo_data):
    found = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(demo_data)))
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{found.server_port}"
    Handler.broken.clear()
    found.shutdown()
    thread.join()
    found.server_close()


def one_epoch(stream):
    ids, steps = [], stream.steps()
    with pytest.raises(DataError, match="max_epochs"):
        while True:
            ids += next(steps).ids
    return Counter(i.rpartition(":")[2] for i in ids)


@pytest.mark.parametrize("workers", [0, 1])
def test_servers_and_commands_give_what_the_files_give(demo_data, server, workers):
    def epoch(path, **keys):
        sources = {"x": SourceConfig(path=path, mode="stream", max_epochs=1, **keys)}
        return one_epoch(open_stream(demo_data, sources, workers, prefetch=1))

    local = epoch("train/text/*.tar")
    shards = ",".join(path.name for path in sorted((demo_data / "train/text").glob("*.tar")))
    names = f"{{{shards}}}" if "," in shards else shards
    assert len(local) > 8 and set(local.values()) == {1}
    command = f"pipe:cat {demo_data}/train/text/{names}"
    assert epoch(command, allow_commands=True) == local
    assert epoch(f"pipe:gzip -c {demo_data}/train/text/{names}", allow_commands=True) == local
    Handler.broken.update(shards.split(","))  # the first answer breaks off, the next one is whole
    assert epoch(f"{server}/train/text/{names}?signature=secret") == local
    assert not +Handler.broken
    with pytest.raises(ConfigError, match="allow_commands"):
        epoch(command)


def test_a_shard_that_a_server_does_not_have_ends_the_run(demo_data, server):
    sources = {"x": SourceConfig(path=f"{server}/gone.tar?signature=secret", mode="stream")}
    with pytest.raises(DataError, match=r"gone\.tar: cannot be read after 4 tries .*exit 22") as error:
        take(open_stream(demo_data, sources), 1)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "change, found",
    [
        ([f"data.sources.{SOURCES[0]}.mode=indexed"], "index these too"),
        (["eval.sources.digits.mode=stream"], "index the validation"),
        ([f"data.sources.{SOURCES[0]}.max_samples=3"], "index the tars"),
    ],
)
def test_what_stream_mode_cannot_do_is_refused_before_the_start(demo_data, tmp_path, change, found):
    from mmscale.cli import train

    words = [f"data.root={demo_data}", f"run.dir={tmp_path / 'run'}", *SMALL, *STREAMED]
    with pytest.raises(ConfigError, match=found):
        train.run(str(RECIPE), [*words, *change])
    assert not (tmp_path / "run").exists()


# training


def words(data, run, *more):
    return [str(RECIPE), f"data.root={data}", f"run.dir={run}", *SMALL, *STREAMED, *more]


def run_here(arguments):
    """One run in this process image: `mmscale train` without the seconds that the imports take."""
    from mmscale.cli import train

    os.setpgid(0, 0)
    path, *overrides = arguments
    train.run(path, overrides)


def start(arguments):
    import mmscale.cli.train
    import mmscale.train.loop  # noqa: F401  (imported once here, inherited by every run)

    process = multiprocessing.get_context("fork").Process(target=run_here, args=(arguments,))
    process.start()
    return process


def rows(run, name="metrics.jsonl"):
    path = Path(run) / name
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return {row["step"]: row for row in (json.loads(line) for line in lines if line.endswith("\n"))}


def reach(process, run, step):
    limit = time.monotonic() + 120
    while max(rows(run), default=0) < step:
        assert process.is_alive(), f"ended with {process.exitcode} before step {step}"
        assert time.monotonic() < limit, "no progress"
        time.sleep(0.005)


def finish(process):
    process.join(120)
    assert process.exitcode == 0, f"exit code {process.exitcode}"


def check_account(data, run):
    """The ledger holds exactly the samples that the state in the newest checkpoint calls taken."""
    newest = max((Path(run) / "checkpoints").glob("step_*"))
    state = json.loads((newest / "trainer.json").read_text())["trainer"]["data"]
    ids = Counter(i for row in rows(run, "ledger.jsonl").values() for i in row["ids"])
    assert state["num_seen"] == ids.total() and state["num_skipped"] == 0
    for name, saved in state["progress"].items():
        progress = Progress.from_dict(saved)
        tars = sorted((data / "train" / name).glob("*.tar"))
        shards = ShardSet.open(data / "train" / name, f"train/{name}")
        last = max([progress.next, *progress.done, *progress.begun])
        for shard, tar in enumerate(tars):
            units = [u for u in range(last + 1) if place_of(u, len(tars), f"0/{name}")[1] == shard]
            keys = [shards.id(row) for row in range(len(shards)) if shards.locate(row)[0] == shard]
            for number, sample_id in enumerate(keys):
                partly = sum(progress.begun[u].taken >> number & 1 for u in units if u in progress.begun)
                assert ids[sample_id] == sum(progress.is_done(u) for u in units) + partly, (tar, sample_id)


@pytest.mark.parametrize("workers", [(0, 2), (2, 0)])
def test_a_run_that_is_stopped_and_killed_loses_and_repeats_nothing(demo_data, tmp_path, workers):
    run = tmp_path / "run"
    process = start(words(demo_data, run, f"data.workers={workers[0]}"))
    reach(process, run, 2)
    os.kill(process.pid, signal.SIGUSR1)
    finish(process)
    assert not (run / "DONE").exists()
    process = start(words(demo_data, run, f"data.workers={workers[1]}"))
    reach(process, run, 5)
    os.killpg(process.pid, signal.SIGKILL)
    process.join(30)
    finish(start(words(demo_data, run, f"data.workers={workers[0]}")))
    metrics = rows(run)
    assert sorted(metrics) == list(range(1, STEPS + 1)) and (run / "DONE").exists()
    assert metrics[STEPS]["loss"] < metrics[1]["loss"]
    assert metrics[STEPS]["epoch"] > metrics[1]["epoch"]
    check_account(demo_data, run)


def test_equal_runs_are_equal(demo_data, tmp_path):
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        finish(start(words(demo_data, run, "data.workers=2", "train.steps=4")))
    a, b = ([row["loss_hex"] for row in rows(run).values()] for run in runs)
    assert a == b and len(a) == 4


def test_check_shows_the_shards_and_runs_nothing(demo_data, tmp_path, capsys, monkeypatch):
    from mmscale.cli import check

    monkeypatch.setenv("COLUMNS", "200")
    marker = tmp_path / "ran"
    command = f"data.sources.text.path=pipe:touch {marker}; cat x.tar"
    arguments = [f"data.root={demo_data}", f"run.dir={tmp_path / 'run'}", *SMALL, *STREAMED, command]
    with pytest.raises(ConfigError, match="allow_commands"):
        check.run(str(RECIPE), arguments, 1)
    check.run(str(RECIPE), [*arguments, "data.sources.text.allow_commands=true"], 1)
    assert "not indexed" in capsys.readouterr().out and not marker.exists()
