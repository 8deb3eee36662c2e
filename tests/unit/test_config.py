"""Configuration: YAML traps, includes, overrides, errors that name file, line, key and remedy."""

import json
from pathlib import Path

import pytest

from mmscale.config.checks import check_config, data_parallel_size
from mmscale.config.llm import llm_sizes
from mmscale.config.load import dump_config, load_config
from mmscale.config.reference import config_reference
from mmscale.errors import ConfigError

REPO = Path(__file__).parents[2]

BASE = """\
model:
  llm: {config: {model_type: llama, hidden_size: 32}}
  tokenizer: {path: tok}
data:
  sources:
    a: {path: a}
  seq_len: 64
train:
  steps: 10
  global_batch: 8
  lr: 1e-4
  parts: {llm: {tune: full}}
run: {dir: out}
"""

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
HEADS = [f"model.llm.config.{key}={value}" for key, value in SIZES.items()]


@pytest.fixture
def write(tmp_path):
    def _write(text, name="c.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return _write


def test_scientific_notation_is_a_float_and_yaml_1_1_words_stay_text(write):
    config = load_config(write(BASE))
    assert config.train.lr == 1e-4
    config = load_config(write(BASE), ["train.lr=3e-5", "run.dir=no", "data.template=0777"])
    assert config.train.lr == 3e-5
    assert Path(config.run.dir).name == "no"
    assert config.data.template == "0777"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BASE.replace("lr: 1e-4", "lern: 1e-4"), r"c\.yaml:11: unknown key 'train\.lern'; did you mean 'lr'\?"),
        (
            BASE.replace("a: {path: a}", "a: {path: a, wieght: 2}"),
            r"c\.yaml:6: unknown key 'data\.sources\.a\.wieght'; did you mean 'weight'",
        ),
        (BASE + "run: {dir: twice}\n", r"c\.yaml:14: the key 'run' is written twice"),
        (BASE.replace("steps: 10", "steps: ten"), r"c\.yaml:9: train\.steps: .*integer.*'ten'"),
        (BASE.replace("steps: 10", ""), r"'train\.steps' is required"),
        (BASE.replace("dir: out", "dir: !!python/object:os.system {}"), r"c\.yaml:13: this is not plain YAML"),
        (BASE.replace("  steps: 10", "  steps: [10"), r"c\.yaml:\d+: this is not plain YAML"),
        ("- 1\n- 2\n", r"expected sections"),
        ("a: \a\n", r"not plain YAML"),
        ("train: {steps: !!int abc}\n", r"not plain YAML"),
        ("train: {deterministic: !!bool maybe}\n", r"not plain YAML"),
        ("a: &x [*x]\n", r"aliases are not read"),
        ("[" * 3000, r"not plain YAML"),
        (BASE.replace("lr: 1e-4", "lr: .inf"), r"train\.lr: .*finite"),
        (BASE.replace("config: {model_type: llama, hidden_size: 32}", ""), r"exactly one of `path` and `config`"),
        (BASE.replace("seq_len: 64", "seq_len: -1"), r"data\.seq_len: .*greater than 0.*-1"),
    ],
)
def test_bad_files_get_one_clear_line(write, text, expected):
    with pytest.raises(ConfigError, match=expected) as error:
        load_config(write(text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("word", ["train.lr", "=3", "train..lr=1", "train.lr=[1", "train.lerning=1"])
def test_bad_overrides_are_named(write, word):
    with pytest.raises(ConfigError, match="override"):
        load_config(write(BASE), [word])


def test_includes_merge_and_the_file_itself_wins(write):
    write("train: {lr: 5e-3, steps: 7}\n", "base/opt.yaml")
    path = write("include: [base/opt.yaml]\n" + BASE)
    assert load_config(path).train.steps == 10
    path = write("include: [base/opt.yaml]\n" + BASE.replace("  lr: 1e-4\n", ""))
    assert load_config(path).train.lr == 5e-3


def test_an_include_circle_is_refused(write):
    path = write("include: [c.yaml]\n" + BASE)
    with pytest.raises(ConfigError, match="includes itself"):
        load_config(path)


def test_missing_and_non_utf8_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the config"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"run: \xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "bad.yaml")


def test_saved_config_reruns_from_another_folder(write, tmp_path, monkeypatch):
    config = load_config(write(BASE), ["train.seed=5"])
    saved = tmp_path / "elsewhere" / "config.yaml"
    saved.parent.mkdir()
    saved.write_text(dump_config(config))
    monkeypatch.chdir(saved.parent)
    assert load_config(saved) == config


@pytest.mark.parametrize(
    ("words", "world", "expected"),
    [
        ((), 3, "global_batch=8 .*6 or 9"),
        (("train.global_batch=12",), 1, "plan_group"),
        (("parallel.tensor=2",), 3, "must divide the 3 processes.*start 2 or 4 .*parallel.tensor=1"),
        (("parallel.tensor=2", "parallel.ulysses=4"), 12, "= 8 must divide the 12.*parallel.ulysses=(2|6)"),
        (("parallel.tensor=2",), 2, "expected `num_attention_heads`"),
        (("parallel.engine=fsdp", "parallel.zero_stage=2"), 2, "engine=fsdp .*zero_stage=2.*remove it"),
        (("parallel.engine=fsdp", "parallel.offload_optimizer=true"), 2, "engine=fsdp .*offload_optimizer=True"),
        (("parallel.tensor_sequence=true",), 1, "tensor_sequence=true.*parallel.tensor=1"),
        (("parallel.deepspeed=none.json",), 1, "no file none.json"),
        (("data.sources.a.mode=stream", *HEADS, "parallel.ulysses=2"), 2, "mode: stream.*parallel.ulysses=2"),
        (("train.parts.llm.tune=frozen",), 1, "nothing would be trained"),
        (("train.parts.vision={tune: full}",), 1, "no model.vision"),
        (("model.vision.config={model_type: siglip_vision_model}",), 1, "train.parts.vision is missing"),
        (("eval.every=5",), 1, "eval.sources is empty"),
        (("data.sources.b.path=./a",), 1, "also the path of data.sources.a"),
        (("data.sources.b.path=b", "data.sources.b.weight=2"), 1, "weight on every source or on none"),
    ],
)
def test_cross_checks(write, words, world, expected):
    with pytest.raises(ConfigError, match=expected):
        check_config(load_config(write(BASE), words), world)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("parallel.tensor=3",), "parallel.tensor=3 must divide the 8 attention heads.*MLP of 128.*2 key/value heads; set it to 2 or 4"),
        (("parallel.tensor=16",), "set it to 8$"),
        (("parallel.tensor=4", "model.llm.config.intermediate_size=150"), "MLP of 150.*set it to 2$"),
        (("parallel.tensor=6", "model.llm.config.num_attention_heads=12", "model.llm.config.num_key_value_heads=4", "model.llm.config.intermediate_size=120"), "set it to 4 or 12"),
        (("parallel.ulysses=16",), "the 8 attention heads.*set it to 8, or .*ulysses=8 and parallel.ring=2"),
        (("parallel.tensor=2", "parallel.ulysses=8"), "the 4 attention heads .* the 1 key/value.*ulysses=4 and parallel.ring=2"),
        (("parallel.ulysses=6", "parallel.ring=4"), "set it to 4 or 8, or for as many ranks parallel.ulysses=8 and parallel.ring=3"),
        (("parallel.ulysses=6", "model.llm.config.num_attention_heads=12", "model.llm.config.num_key_value_heads=4"), "4 or 12"),
        (("parallel.tensor=2", "model.tokenizer.pad_to_multiple=1"), "pad_to_multiple=1 .*tensor=2.*set it to 2"),
        (("parallel.ring=2", "parallel.sp=ring", "model.llm.config.sliding_window=8"), "sliding window.*8.*sp=exchange"),
    ],
)  # fmt: skip
def test_degrees_that_the_heads_do_not_allow_are_refused_with_the_nearest(write, words, expected):
    """One head too few is found out before a process group or a model exists."""
    config = load_config(write(BASE), [*HEADS, *words])
    p = config.parallel
    with pytest.raises(ConfigError, match=expected):
        check_config(config, p.tensor * p.ulysses * p.ring * 4)


@pytest.mark.parametrize(
    "words",
    [
        ("parallel.tensor=8",),
        ("parallel.ulysses=8",),
        ("parallel.tensor=2", "parallel.ulysses=4", "parallel.ring=16"),
        ("parallel.ring=2", "parallel.sp=exchange", "model.llm.config.sliding_window=8"),
        ("parallel.ring=2", "parallel.sp=ring", "model.llm.config.sliding_window=64"),
        ("parallel.engine=fsdp", "parallel.zero_stage=1"),
        ("parallel.sp=auto", "train.global_batch=4"),
    ],
)
def test_degrees_that_fit_pass(write, words):
    config = load_config(write(BASE), [*HEADS, *words])
    p = config.parallel
    check_config(config, p.tensor * p.ulysses * p.ring * 8)


def test_a_vocabulary_that_does_not_divide_is_refused(write, tmp_path):
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm/config.json").write_text(json.dumps({**SIZES, "model_type": "llama", "vocab_size": 1001}))
    config = load_config(write(BASE), [f"model.llm={{path: {tmp_path / 'llm'}}}", "parallel.tensor=2"])
    with pytest.raises(ConfigError, match=r"parallel\.tensor=2 must divide the vocabulary of 1001 rows"):
        check_config(config, 2)


def test_windows_count_as_their_families_read_them():
    found = [
        llm_sizes({**SIZES, "model_type": kind, "sliding_window": window, **more}).window
        for kind, window, more in (
            ("mistral", None, {}),
            ("mistral", 7, {}),
            ("qwen2", 7, {}),
            ("qwen3", 7, {"use_sliding_window": True}),
            ("llama", None, {}),
        )
    ]
    assert found == [None, 7, None, 7, None]
    assert llm_sizes({**SIZES, "model_type": "mistral"}).window == 4096


def test_good_layouts_pass(write):
    config = load_config(write(BASE))
    for world in (1, 2, 4, 8):
        check_config(config, world)
        assert data_parallel_size(config.parallel, world) == world


def test_the_printed_reference_is_current():
    assert (REPO / "docs/configuration.md").read_text() == config_reference(), "run: make fix"
