"""Configuration: YAML traps, includes, overrides, errors that name file, line, key and remedy."""

from pathlib import Path

import pytest

from mmscale.config.checks import check_config, data_parallel_size
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
        (("parallel.tensor=2",), 3, "must divide the 3 processes"),
        (("parallel.ulysses=2",), 2, "parallel.ulysses=2"),
        (("parallel.engine=fsdp",), 2, "engine"),
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


def test_good_layouts_pass(write):
    config = load_config(write(BASE))
    for world in (1, 2, 4, 8):
        check_config(config, world)
        assert data_parallel_size(config.parallel, world) == world


def test_the_printed_reference_is_current():
    assert (REPO / "docs/configuration.md").read_text() == config_reference(), "run: make fix"
