"""The tools that look: what verify finds and remembers, what stats counts, what a plan promises, what a picture shows."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import random
import sys
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmscale.config.cost import FEATURES, predict_cost
from mmscale.config.schema import CostConfig
from mmscale.data_tools import cli
from mmscale.data_tools.inspection.pack_html import render_html
from mmscale.data_tools.inspection.pack_png import COLORS, MAX_DOCUMENTS, WIDTH, render_png
from mmscale.data_tools.inspection.pack_preview import read_pack
from mmscale.data_tools.inspection.pack_view import view_pack
from mmscale.data_tools.inspection.plan_fit import fit_run
from mmscale.data_tools.inspection.plan_folders import Assumed, folder_plan
from mmscale.data_tools.inspection.plan_report import PlanInput, pack_table, plan_report, run_plan
from mmscale.data_tools.inspection.preview import write_preview
from mmscale.data_tools.inspection.run_stream import open_run_stream
from mmscale.data_tools.inspection.stats import dataset_stats
from mmscale.data_tools.inspection.verify import verify_folder, write_report
from mmscale.data_tools.inspection.verify_journal import JOURNAL_NAME
from mmscale.data_tools.writer import ShardWriter
from mmscale.errors import ConfigError, DataError, RefusedInputError
from mmscale.streaming.draws import PlanSource
from mmscale.streaming.pack import cost_imbalance
from mmscale.streaming.plan import TOO_LONG, Plan, PlanRules, PlanState, pack_features
from mmscale.streaming.shards import ShardSet
from mmscale.streaming.tokenizer import TextTokenizer
from mmscale.types import IGNORE, AudioSpec, ImageSpec, MediaSpecs, Skip

RECIPE = Path(__file__).parents[2] / "configs/recipes/digits.yaml"


def png(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def wav(seconds: float, seed: int = 0) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.random.default_rng(seed).normal(0, 0.1, int(8000 * seconds)), 8000, format="WAV")
    return out.getvalue()


def dataset(folder: Path, samples: dict[str, dict[str, bytes]], per_shard: int = 2) -> Path:
    with ShardWriter(folder, max_samples=per_shard) as writer:
        for key, files in samples.items():
            writer.write(key, files)
    return folder


def captions(num: int) -> dict[str, dict[str, bytes]]:
    return {f"k{i}": {"png": png(i), "txt": b"caption %d" % i} for i in range(num)}


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit code of the command line, run in this process as the entry point does."""
    monkeypatch.setattr(sys, "argv", ["mmscale-data", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


# --- verify


def test_decoding_finds_what_headers_hide_and_spares_the_neighbours(tmp_path: Path) -> None:
    broken, cut = bytearray(png(8)), wav(1.0)[:-3000]
    broken[len(broken) // 2] ^= 0x55
    files = {**captions(2), "bad": {"png": bytes(broken), "txt": b"x"}, "cut": {"wav": cut, "txt": b"y"}}
    folder = dataset(tmp_path / "d", {**files, "z": {"wav": wav(0.5), "txt": b"z"}})
    assert verify_folder(folder).findings == ()  # both headers can be read
    report = verify_folder(folder, decode=True)
    assert [(f.reason, f.detail.split(":")[0]) for f in report.findings][:1] == [("decode_image", "bad")]
    assert {f.detail.split(":")[0] for f in report.findings} <= {"bad", "cut"}
    assert report.samples == report.indexed - len(report.findings)
    assert report.remembered == 0  # what was checked without decoding is not enough


def test_duplicates_are_noted_and_are_no_fault(tmp_path: Path) -> None:
    same = png(1)
    folder = dataset(
        tmp_path / "d",
        {
            "a": {"png": same, "txt": b"one"},
            "b": {"png": png(2), "txt": b"two"},
            "c": {"png": same, "txt": b"one"},
            "d": {"png": same, "txt": b"three"},
            "e": {
                "json": json.dumps(
                    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
                ).encode()
            },
        },
    )
    report = verify_folder(folder)
    assert report.findings == () and report.samples == 5
    notes = {note.kind: (note.count, note.examples[0]) for note in report.notes}
    assert notes["duplicate_sample"] == (1, "000000.tar:a = 000001.tar:c")
    assert notes["repeated_text"] == (1, "000000.tar:a = 000001.tar:c")
    assert notes["repeated_media"] == (2, "000000.tar:a = 000001.tar:c")
    assert notes["other_extensions"] == (1, "000002.tar has [json], most have [png txt]")
    assert "duplicate_key" not in notes
    assert verify_folder(dataset(tmp_path / "clean", captions(6))).notes == ()


def test_a_key_in_two_shards_is_noted(tmp_path: Path) -> None:
    for name in ("x", "y"):
        dataset(tmp_path / name, {"a": {"png": png(ord(name)), "txt": name.encode()}})
    os.replace(tmp_path / "y/000000.tar", tmp_path / "x/000001.tar")
    from mmscale.data_tools.indexing import index_folder

    index_folder(tmp_path / "x")
    notes = verify_folder(tmp_path / "x").notes
    assert [(note.kind, note.examples) for note in notes] == [("duplicate_key", ("000000.tar:a = 000001.tar:a",))]


def test_a_stopped_check_goes_on_and_a_changed_shard_is_read_again(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d", captions(6))
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.tar"))]

    def stop(done: int, total: int, what: str) -> None:
        assert total == sum(sizes)
        if done > sizes[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify_folder(folder, stop)
    assert verify_folder(folder).remembered == 1
    seen = []
    report = verify_folder(folder, lambda done, total, what: seen.append(done))
    assert (report.remembered, report.samples, seen) == (3, 6, [])
    assert verify_folder(folder, again=True).remembered == 0

    data = bytearray((folder / "000001.tar").read_bytes())
    data[700] ^= 1
    (folder / "000001.tar").write_bytes(data)
    for _ in range(2):  # damage is never taken from the journal
        report = verify_folder(folder)
        assert (report.remembered, [(f.shard, f.reason) for f in report.findings]) == (2, [("000001.tar", "damaged")])
    (folder / JOURNAL_NAME / "000000.tar.npz").write_bytes(b"half a file")
    assert verify_folder(folder).remembered == 1


def test_what_was_found_is_remembered_with_the_shard(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d", {**captions(1), "bad": {"png": b"no picture", "txt": b"x"}})
    first, second = verify_folder(folder), verify_folder(folder)
    assert second.remembered == 1 and first.findings == second.findings and first.notes == second.notes
    assert [f.reason for f in second.findings] == ["media_header"]


def test_a_folder_that_takes_no_journal_is_checked_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = dataset(tmp_path / "d", captions(4))
    (folder / JOURNAL_NAME).touch()  # a file where the journal's folder should be
    with caplog.at_level(logging.WARNING):
        assert verify_folder(folder).samples == 4
    assert sum("begins anew" in record.message for record in caplog.records) == 1


def test_processes_find_what_one_finds(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d", {**captions(5), "bad": {"png": b"no picture", "txt": b"x"}})
    alone = verify_folder(folder, again=True)
    seen: list[int] = []
    report = verify_folder(folder, lambda done, total, what: seen.append(done), again=True, workers=2)
    assert report == alone and seen == sorted(seen)
    assert seen[-1] == sum(path.stat().st_size for path in folder.glob("*.tar"))


def test_a_process_that_dies_ends_the_check_with_what_is_done_kept(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d", captions(40), per_shard=1)
    others = set(multiprocessing.active_children())  # of tests that ran before in this process

    def kill_one(done: int, total: int, what: str) -> None:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()

    with pytest.raises(DataError, match="a process of the check died"):
        verify_folder(folder, kill_one, workers=1)
    assert not set(multiprocessing.active_children()) - others
    assert verify_folder(folder).samples == 40


def test_the_report_of_several_folders_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = dataset(tmp_path / "good", captions(2))
    bad = dataset(tmp_path / "bad", {"a": {"png": b"no", "txt": b"x"}})
    assert run(monkeypatch, "verify", good, bad, "--json", tmp_path / "out/report.json") == 1
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [report[str(folder)]["ok"] for folder in (good, bad)] == [True, False]
    assert report[str(bad)]["findings"][0]["reason"] == "media_header"
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report({}, tmp_path / "out/report.json/x")


# --- stats


def test_stats_count_tokens_beside_media_and_draw_them(
    demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = TextTokenizer.load(demo_data / "tokenizer")
    folder = demo_data / "train/compare"
    found = dataset_stats(folder, tokenizer=tokenizer)
    data = ShardSet.open(folder, "s")
    texts = [t.text.replace("<image>", "") for row in range(len(data)) for t in data.read(row).turns]
    assert found.text_tokens == {"image": sum(map(len, tokenizer.encode_batch(texts)))}
    assert found.spreads["text per sample, tokens"].total == found.text_tokens["image"]
    out = tmp_path / "stats.png"
    assert run(monkeypatch, "stats", folder, demo_data / "train/audio", "--png", out) == 0
    with Image.open(out) as picture:
        assert picture.format == "PNG" and picture.width > 1000


# --- plan


def source(name: str, tokens: object, vision: int = 0, share: Fraction | None = None) -> PlanSource:
    tokens = np.asarray(tokens, np.uint32)
    inputs = np.full(len(tokens), vision, np.uint16)
    reasons = {int(row): TOO_LONG for row in np.flatnonzero(tokens == 0)}
    return PlanSource(name, tokens, inputs, inputs * 0, reasons, share or Fraction(len(tokens)))


def plan_input(sources: list[PlanSource], steps: int = 100, batch: int = 8, **rules: object) -> PlanInput:
    base = {
        "seq_len": 1000,
        "plan_group": 8,
        "window": None,
        "seed": 0,
        "shuffle_block": 1,
        "max_images_per_pack": None,
    }
    plan = Plan(sources, PlanRules(**{**base, "cost": CostConfig(token=1000, pair=1, vision_input=9), **rules}))
    none = [np.zeros(len(s.tokens), np.int64) for s in sources]
    tokens = [
        {"text": s.tokens.astype(np.int64), "image": n, "video": n, "audio": n}
        for s, n in zip(sources, none, strict=True)
    ]
    return PlanInput(plan, tokens, lambda s, row: f"{sources[s].name}:{row}", [{} for _ in sources], steps, batch)


def test_the_report_says_what_the_steps_will_do(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(10, 400, 3000), rng.integers(5, 60, 800)
    a[::50] = 0
    data = plan_input([source("a", a, vision=2), source("b", b, share=Fraction(1000))])
    report = plan_report(data, (4, 8), num_steps=60)
    packs = [pack for step in list_steps(data, 60) for pack in step.packs]
    assert np.allclose(report.fill, [sum(d.tokens for d in pack) / 1000 for pack in packs])
    features = np.array([pack_features(pack, data.plan.sources) for pack in packs], float)
    assert np.array_equal(features, pack_table(packs, np.array([d for p in packs for d in p]), data.plan.sources))
    assert np.allclose(report.costs, predict_cost(data.plan.rules.cost, features))
    assert (report.imbalance[0].mean, report.imbalance[0].worst) == cost_imbalance(report.costs, 4)
    assert report.imbalance[1].mean < report.imbalance[1].random_mean
    total = sum(sum(s.tokens.values()) for s in report.sources)
    assert total == sum(d.tokens for pack in packs for d in pack)
    assert report.sources[0].skipped == {TOO_LONG: 60} and report.sources[0].usable == 2940
    assert report.advice == () or "longer than" in report.advice[0]


def list_steps(data: PlanInput, num: int) -> list:
    steps = data.plan.steps(PlanState(), data.global_batch)
    return [next(steps) for _ in range(num)]


def test_epochs_in_steps_are_those_of_the_plan(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sources = [source("a", rng.integers(10, 400, 2000)), source("b", rng.integers(5, 60, 500), share=Fraction(1500))]
    data = plan_input(sources, steps=300)
    report = plan_report(data, (8,))
    drawn = [0, 0]
    for step in list_steps(data, 300):
        for draw in (d for pack in step.packs for d in pack):
            drawn[draw.source_idx] += 1
    for told, count, rows in zip(report.sources, drawn, (2000, 500), strict=True):
        assert told.epochs == pytest.approx(count / rows, rel=0.05)
        assert told.epoch_steps * told.epochs == pytest.approx(300)


LOW_FILL = {
    "documents over half a pack": ({"a": [700] * 500}, {}, "takes more than half"),
    "a cap on images": ({"a": [100] * 500}, {"max_images_per_pack": 4}, "max_images_per_pack"),
    "a tiny source": (
        {"a": np.random.default_rng(0).integers(40, 500, 40)},
        {"plan_group": 1},
        "raise data.plan_group",
    ),
    "lengths that never fit": ({"a": [333] * 6000}, {"seq_len": 900}, "another data.seq_len"),
    "a small window": ({"a": list(range(10, 480)) * 5}, {"window": 12, "plan_group": 1}, "raise data.window"),
}


@pytest.mark.parametrize("why", LOW_FILL)
def test_the_advice_names_why_the_fill_is_low(why: str) -> None:
    lengths, rules, found = LOW_FILL[why]
    report = plan_report(plan_input([source(n, t, vision=1) for n, t in lengths.items()], **rules), (1,))
    assert report.fill.mean() < 0.98
    assert len(report.advice) == 1 and found in report.advice[0], report.advice


def test_the_advice_for_a_tiny_source_helps() -> None:
    lengths, rules, _ = LOW_FILL["a tiny source"]
    data = plan_input([source("a", lengths["a"])], **{**rules, "plan_group": 8})
    assert plan_report(data, (1,)).advice == ()


def test_no_advice_when_all_is_well_and_ranks_beyond_the_group_are_told(seed: int) -> None:
    data = plan_input([source("a", np.random.default_rng(seed).integers(1, 300, 4000))])
    assert plan_report(data, (8,)).advice == ()
    assert "plan_group=64" in plan_report(data, (8, 64)).advice[0]


def test_long_samples_are_told_with_the_length_that_keeps_them() -> None:
    tokens = np.full(1000, 100)
    tokens[:300] = 0
    data = plan_input([source("a", tokens)])
    data.tokens[0]["text"][:300] = 1500
    report = plan_report(data, (8,))
    assert report.largest[0] == ("a:0", 1500, TOO_LONG)
    assert "30.0% of 'a'" in report.advice[-1] and "data.seq_len=1500" in report.advice[-1]


def test_folders_are_planned_by_their_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    long = {"long": {"txt": b"x" * 4000, "png": png(1)}}
    folder = dataset(tmp_path / "d", {**captions(20), **long, "s": {"wav": wav(2.0), "txt": b"abcdefgh"}})
    data = folder_plan([folder], Assumed(500, 4, 64, 8, 10.0), None, 4)
    assert data.plan.sources[0].tokens.tolist() == [64 + 3] * 20 + [0, 20 + 2]
    assert data.plan.sources[0].reasons == {20: TOO_LONG}
    assert (
        run(
            monkeypatch,
            "plan",
            folder,
            "--seq-len",
            500,
            "--ranks",
            "4",
            "--png",
            tmp_path / "p.png",
            "--image-tokens",
            64,
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "estimated as 4 bytes" in out and "too_long" in out and "d/000010.tar:long" in out
    assert (tmp_path / "p.png").stat().st_size > 1000
    for words, text in (([], "expected a run's config"), ([folder, "--ranks", "8;9"], "--ranks")):
        assert run(monkeypatch, "plan", *words) == 2
        assert text in capsys.readouterr().err


def test_folders_with_a_tokenizer_count_their_texts(demo_data: Path) -> None:
    folder, tokenizer = demo_data / "train/words", TextTokenizer.load(demo_data / "tokenizer")
    data = folder_plan([folder], Assumed(512, 4, 16, 8, 10.0), tokenizer, 4)
    stats = dataset_stats(folder, tokenizer=tokenizer)
    assert data.tokens[0]["text"].sum() == stats.text_tokens["image"]


@pytest.fixture(scope="module")
def overrides(demo_data: Path) -> list[str]:
    return [
        f"data.root={demo_data}",
        "data.workers=0",
        "train.steps=60",
    ]


def test_the_plan_of_a_run_is_the_plan_it_trains(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    data = run_plan(open_run_stream(RECIPE, overrides))
    opened = open_run_stream(RECIPE, overrides)
    report = plan_report(data, (1, 2), num_steps=3)
    steps = opened.stream.steps()
    batches = [next(steps) for _ in range(3)]
    tokens = {kind: sum(p.tokens.get(kind, 0) for b in batches for p in b.packs) for kind in ("text", "image", "audio")}
    told = {kind: sum(s.tokens[kind] for s in report.sources) for kind in tokens}
    assert told == tokens
    assert run(monkeypatch, "plan", RECIPE, *overrides) == 0
    out = capsys.readouterr().out
    assert "fill: mean" in out and "digits" in out


def planted_run(folder: Path, overrides: list[str], cost: CostConfig, ranks: int, seed: int, steps: int = 200) -> Path:
    """A run directory whose step times are those of `cost` with 2 % noise."""
    from mmscale.config.load import dump_config, load_config

    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(load_config(RECIPE, overrides)))
    stream = open_run_stream(folder / "config.yaml").stream
    rng = random.Random(seed)
    metrics, ledger = [], []
    for number, step in zip(range(1, steps + 1), stream.plan.steps(PlanState(), 2), strict=False):
        own = [
            np.sum([pack_features(p, stream.plan.sources) for p in step.for_rank(r, ranks)], axis=0)
            for r in range(ranks)
        ]
        seconds = max(float(predict_cost(cost, np.array(f, float))) for f in own) * rng.gauss(1, 0.02)
        metrics.append({"step": number, "step_time_s": seconds / 0.75, "data_wait_frac": 0.25})
        ledger.append(
            {"step": number, "ids": [stream.sources[d.source_idx].shards.id(d.row) for p in step.packs for d in p]}
        )
    for name, rows in (
        ("metrics", metrics),
        ("ledger", ledger),
        ("events", [{"event": "start", "step": 0, "dp_size": ranks}]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_cost_that_was_planted_in_step_times_is_found(
    tmp_path: Path, overrides: list[str], seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    cost = CostConfig(fixed=0.02, token=1e-4, pair=1e-7, vision_input=2e-3, audio_input=4e-3)
    folder = planted_run(tmp_path / "run", overrides, cost, 2, seed)
    found = fit_run(folder)
    assert (found.steps, found.ranks) == (200, 2)
    assert found.fitted.mean_error < 0.03  # the noise itself is 1.6 % on average
    assert run(monkeypatch, "plan", "--fit", folder) == 0
    out = capsys.readouterr().out
    assert "another cost is another plan" in out and all(f"    {name}: " in out for name in FEATURES)


def test_a_run_that_held_other_samples_is_not_fitted(tmp_path: Path, overrides: list[str]) -> None:
    folder = planted_run(tmp_path / "run", overrides, CostConfig(token=1e-4, pair=1e-7), 1, 0, steps=5)
    ledger = (folder / "ledger.jsonl").read_text().replace('"step": 3, "ids": ["train', '"step": 3, "ids": ["other')
    (folder / "ledger.jsonl").write_text(ledger)
    with pytest.raises(RefusedInputError, match="step 3"):
        fit_run(folder)
    (folder / "events.jsonl").write_text("")
    with pytest.raises(RefusedInputError, match="--ranks"):
        fit_run(folder)
    with pytest.raises(RefusedInputError, match=r"config\.yaml"):
        fit_run(tmp_path)


# --- preview

SPECS = MediaSpecs(
    image=ImageSpec(size=28, tokens=4, side=2),
    audio=AudioSpec(rate_hz=16000, window_samples=3200, tokens=10, mel_bins=8),
)


def random_documents(seed: int) -> list[list[tuple[str, int]]]:
    rng = random.Random(seed)
    parts = [("text", 5), ("image", 1), ("audio", 4000), ("text", 2), ("image", 1)]
    return [[("text", rng.randint(1, 6)), *rng.sample(parts, rng.randint(0, 5))] for _ in range(rng.randint(1, 9))]


def test_the_view_of_a_pack_holds_every_token_once_as_what_it_is(make_pack, seed: int) -> None:
    pack = make_pack(SPECS, random_documents(seed), seed)
    view = view_pack(pack, "p", 500, lambda ids: " ".join(map(str, ids)))
    media = sum(int(batch.num_tokens.sum()) for batch in pack.media.values())
    assert view.num_tokens == pack.num_tokens and [d.id for d in view.documents] == list(pack.ids)
    at = 0
    for document in view.documents:
        assert document.start == at
        for item in document.runs:
            assert item.start == at
            inside = range(at, at + item.num_tokens)
            if item.media is None:
                assert item.text == " ".join(map(str, pack.input_ids[inside].tolist()))
                assert all((t > 0 and int(pack.labels[t - 1]) != IGNORE) == (item.kind == "target") for t in inside)
            else:
                assert all(int(pack.source_index[t]) >= pack.num_tokens for t in inside)
            at += item.num_tokens
        assert at == document.start + document.num_tokens
    assert view.count("target") == pack.num_targets
    assert sum(view.count(kind) for kind in ("image", "audio")) == media
    shown = [item.media for d in view.documents for item in d.runs if item.kind == "image"]
    if shown:
        assert torch.equal(torch.cat(shown), pack.media["image"].data)


class _Html(HTMLParser):
    """Collects what a page would load, its tags and its text; raises on tags that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.links, self.tags, self.texts, self._open = [], set(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_loads_nothing_and_runs_nothing(make_pack) -> None:
    pack = make_pack(
        SPECS, [[("text", 4), ("image", 1), ("text", 3)], [("text", 3)], [("audio", 4000), ("text", 2)]], 3
    )
    evil = "<script>alert(1)</script><img src=http://x/y onerror=z>"
    object.__setattr__(pack, "skipped", (Skip("d1", "decode_image", evil),))
    page = render_html(view_pack(pack, evil, 500, lambda ids: evil))
    parsed = _Html()
    parsed.feed(page)
    assert parsed._open == []
    assert "script" not in parsed.tags and evil in parsed.texts
    assert all(link.startswith(("data:image/png;base64,", "#d")) for link in parsed.links)
    assert sum(link.startswith("data:") for link in parsed.links) == 2
    assert "http" not in page.replace("http-equiv", "").replace("src=http://x/y", "")


def test_the_picture_has_the_colours_of_the_tokens(make_pack) -> None:
    pack = make_pack(SPECS, [[("text", 4), ("image", 1), ("audio", 4000)]], 3, target_share=0.0)
    view = view_pack(pack, "p", 100, lambda ids: "x")
    picture = render_png(view)
    assert picture.width == WIDTH
    found = {color for _, color in picture.getcolors(1 << 24)}
    assert {COLORS["text"], COLORS["image"], COLORS["audio"]} <= found
    assert COLORS["target"] not in found and COLORS["filler"] not in found
    many = make_pack(SPECS, [[("text", 2)]] * (MAX_DOCUMENTS + 20), 3)
    few = make_pack(SPECS, [[("text", 2)]] * MAX_DOCUMENTS, 3)
    heights = [render_png(view_pack(p, "p", 500, lambda ids: "x")).height for p in (many, few)]
    assert 0 < heights[0] - heights[1] < 60  # one line instead of 20 documents


def test_the_pack_that_is_shown_is_the_pack_that_is_trained(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    opened = open_run_stream(RECIPE, overrides)
    steps = opened.stream.steps()
    packs = [pack for _ in range(3) for pack in next(steps).packs]
    for number in (0, 5):
        view = read_pack(opened, number)
        trained = next(pack for pack in packs if pack.ids == tuple(d.id for d in view.documents))
        assert view.count("target") == trained.num_targets and view.num_tokens == trained.num_tokens
    for name in ("p.png", "p.html"):
        assert run(monkeypatch, "preview", RECIPE, *overrides, "--pack", 5, "--out", tmp_path / name) == 0
        assert "step 3" in capsys.readouterr().out
        assert (tmp_path / name).stat().st_size > 5000
    assert run(monkeypatch, "preview", RECIPE, *overrides, "--out", tmp_path / "p.gif") == 2
    assert run(monkeypatch, "preview", RECIPE, *overrides, "--pack", "-1", "--out", tmp_path / "p.png") == 2
    assert run(monkeypatch, "preview", RECIPE, *overrides, "--pack", 10**9, "--out", tmp_path / "p.png") == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and "the run has" in error


def test_samples_are_shown_with_pictures_tokens_and_first_frames(demo_data: Path, tmp_path: Path) -> None:
    from mmscale.streaming.decode.video import mux_frames

    clip = mux_frames([png(i, (64, 64)) for i in range(3)])
    folder = dataset(tmp_path / "d", {"v": {"mkv": clip, "txt": b"moves"}, "b": {"mkv": b"no clip", "txt": b"x"}})
    assert write_preview(folder, tmp_path / "v.png", tokenizer=demo_data / "tokenizer") == 2
    with Image.open(tmp_path / "v.png") as sheet, Image.open(io.BytesIO(png(0, (64, 64)))) as frame:
        shown = np.asarray(sheet.convert("RGB").crop((8, 8, 120, 108)), float).mean((0, 1))
        assert np.abs(shown - np.asarray(frame, float).mean((0, 1))).max() < 12
