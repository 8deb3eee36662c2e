"""Secrets are taken out of texts, and nothing else is."""

import json
import logging
import random
import string
import sys
import time

import pytest

from mmscale import redact
from mmscale.config.env import secrets_from_env
from mmscale.config.load import dump_config, load_config
from mmscale.errors import ConfigError
from mmscale.logging import get_logger, setup
from mmscale.redact import bare_url, find_secrets, hidden_keys, hide, is_secret_name, redact_values
from mmscale.train.attempt import Attempt, write_json
from mmscale.train.metrics import JsonLines

S3 = "https://bucket.s3.amazonaws.com/a.tar?X-Amz-Credential=AKIAEXAMPLE%2F2026&X-Amz-Signature=0a1b2c3d4e5f60718293"


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """What a test hides ends with it."""
    monkeypatch.setattr(redact, "_hidden", set())
    monkeypatch.setattr(redact, "_found", None)


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "AWS_SESSION_TOKEN",
        "MY_PASSWORD",
        "PGPASSWORD",
        "WANDB_API_KEY",
        "apiKey",
        "accessToken",
        "http.authorization",
        "GOOGLE_CREDENTIALS",
        "X-Amz-Signature",
        "sig",
        "token",
        "ssh_key",
        "SLURM_JWT",
        "db-passwd",
        "client_secret",
        "NPM_AUTHTOKEN",
    ],
)
def test_names_of_secrets(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer",
        "TOKENIZERS_PARALLELISM",
        "max_tokens",
        "num_tokens",
        "tokens_per_s",
        "pad_token",
        "bos_token_id",
        "image_token",
        "keep_last",
        "key",
        "keys",
        "train.keep_every",
        "seq_len",
        "MMSCALE_ATTEMPT",
        "num_key_value_heads",
        "monkey",
        "design",
        "sigma",
        "PATH",
        "root",
        "target_tokens",
        "SLURM_JOB_ID",
    ],
)
def test_names_of_no_secrets(name):
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"GET {S3}: 403", "GET https://bucket.s3.amazonaws.com/a.tar?*** 403"),
        ("'https://me:p@ss@host:8080/a.tar' fails", "'https://***@host:8080/a.tar' fails"),
        (
            "https://acct.blob.core.windows.net/c/x.tar?sv=2&sig=abc%3D, next",
            "https://acct.blob.core.windows.net/c/x.tar?*** next",
        ),
        ("https://host/a?token=1 and https://host/b", "https://host/a?*** and https://host/b"),
        ("curl -H 'Authorization: Bearer ab.cd-ef' -u me:pw1 x", "curl -H 'Authorization: Bearer ***' -u me:*** x"),
        ("curl --user=me:pw1 --api-key abc -o x", "curl --user=me:*** --api-key *** -o x"),
        ("AWS_SECRET_ACCESS_KEY=abc/def aws s3 cp", "AWS_SECRET_ACCESS_KEY=*** aws s3 cp"),
        ("{'password': 'hunter2', 'user': 'me'}", "{'password': ***, 'user': 'me'}"),
        ('{"api_key": "a b c", "n": 1}', '{"api_key": ***, "n": 1}'),
    ],
)
def test_what_is_taken_out(text, expected):
    assert redact.redact(text) == expected
    assert redact.redact(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "step 3/10 loss 2.1 | tokens text 12 image 4 | 5,000 tok/s",
        "model.tokenizer.path=/data/tokenizer, max_tokens=5, train.keep_last=3",
        "unknown token: '<image>'; pad_token='<pad>', bos_token_id=1",
        "train/text/shard-000001.tar:key-0001",
        "https://github.com/pytorch/pytorch/issues/76287 and http://127.0.0.1:8000/a@b/c",
        "file:///a/b, hdfs://host/x/{000..009}.tar, a::b, http://[::1, ://",
        "a step of 3 s: attempt 4711.2, expected key 'label', found none",
    ],
)
def test_what_stays(text):
    assert redact.redact(text) == text


def test_a_value_that_is_hidden_goes_in_every_spelling():
    secret = 'pa"ss\\wörd/+ &x'
    hide([secret, "short"])
    for text in (secret, json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret)):
        found = redact.redact(f"a {text} b")
        assert "ss" not in found and "***" in found, found
    from urllib.parse import quote, quote_plus

    assert "rd" not in redact.redact(quote(secret) + quote(secret, safe="") + quote_plus(secret))
    assert redact.redact("a short text") == "a short text"


def test_random_secrets_in_random_texts(seed):
    rng = random.Random(seed)
    for _ in range(300):
        secret = "".join(rng.choices(string.ascii_letters + string.digits + "-._~+/=%!", k=rng.randint(12, 40)))
        userinfo = "".join(c for c in secret if c not in "/?#%+=")
        for text in (
            f"https://me:{userinfo}@host/x", f"https://host/x?sig={secret}&a=b", f"MY_TOKEN={secret} run",
            f"Authorization: Bearer {secret}", f"--password {secret} x",
        ):  # fmt: skip
            assert secret not in redact.redact(text) and userinfo not in redact.redact(text), text


def test_values_and_secrets_of_a_config():
    values = {
        "data": {
            "root": "https://me:hunter22@host/d",
            "sources": {
                "token": {"path": S3, "weight": 1.0},
                "b": {"path": "pipe:curl -H 'Authorization: Bearer abcdef' https://h/x.tar"},
                "tokenizer": {"path": "/plain"},
            },
        },
        "model": {"llm": {"config": {"auth_token": "abcdefgh", "pad_token": "<pad>", "vocab_size": 5}}},
    }
    found = set(find_secrets(values))
    assert {"hunter22", "0a1b2c3d4e5f60718293", "abcdef", "abcdefgh"} <= found
    assert not {"<pad>", "/plain"} & found
    hide(found)
    safe = redact_values(values)
    text = json.dumps(safe)
    assert not [one for one in ("hunter22", "0a1b2c", "AKIA", "abcdef") if one in text], text
    assert (
        safe["data"]["sources"]["tokenizer"] == {"path": "/plain"} and safe["data"]["sources"]["token"]["weight"] == 1.0
    )
    assert sorted(hidden_keys(safe)) == [
        "data.root", "data.sources.b.path", "data.sources.token.path", "model.llm.config.auth_token",
    ]  # fmt: skip


def test_secrets_of_the_environment(tmp_path):
    env = {
        "HF_TOKEN": "hf_abcdef",
        "MY_PASSWORD": "",
        "PATH": "/bin",
        "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path),
        "X": "y",
    }
    assert secrets_from_env(env) == ["hf_abcdef"]


def test_bare_url_keeps_what_names_a_file():
    assert bare_url("https://me:secret@h/x y.tar?sig=1#f") == "https://h/x y.tar"
    assert bare_url("s3://bucket/a@b.tar") == "s3://bucket/a@b.tar"
    assert bare_url("/plain/path?x") == "/plain/path?x"


def test_logs_and_tracebacks_are_redacted(capfd):
    hide(["hf_abcdefgh"])
    setup()
    try:
        raise OSError(f"no answer from {S3}")
    except OSError:
        logging.getLogger("mmscale.x").exception("with hf_abcdefgh: %s", "https://me:hunter22@host/a")
    get_logger("mmscale.x").info("this can be read")
    handlers, root = logging.getLogger().handlers, logging.getLogger()
    root.handlers = []  # as outside of pytest: a library that has set up no handler
    try:
        logging.getLogger("some.library").warning("retry %s", S3)
    finally:
        root.handlers = handlers
    sys.stderr.flush()
    text = capfd.readouterr().err
    assert "Traceback" in text and "this can be read" in text and "retry https://bucket" in text
    assert not [one for one in ("hf_abcdefgh", "0a1b2c", "hunter22") if one in text], text


def test_records_are_redacted_and_stay_json(tmp_path):
    hide(['quo"ted-secret'])
    lines = JsonLines(tmp_path / "events.jsonl")
    row = {
        "event": "save_failed",
        "step": 3,
        "reason": f'no answer from {S3}"; quo"ted-secret',
        "ids": ["a:b"],
        "x": float("nan"),
    }
    lines.write(row)
    lines.close()
    write_json(tmp_path / "end.json", row)
    attempt = Attempt(tmp_path, "4711.0")
    attempt.claim()
    attempt.ended("failed", reason=f"OSError: {S3}")
    for path in (tmp_path / "events.jsonl", tmp_path / "end.json", tmp_path / "attempts/4711.0/end.json"):
        text = path.read_text()
        assert "0a1b2c" not in text and "ted-secret" not in text and "bucket.s3" in json.loads(text)["reason"]
    assert json.loads((tmp_path / "events.jsonl").read_text())["ids"] == ["a:b"]


CONFIG = """
model: {llm: {config: {model_type: llama}}, tokenizer: {path: tokenizer}}
data: {root: "https://me:hunter22@host/d?sig=abcdefabcdef", sources: {a: {path: x}}, seq_len: 64}
train: {steps: 1, global_batch: 1, lr: 0.1, parts: {llm: {tune: full}}}
run: {dir: run}
"""


def test_a_stored_config_says_what_is_left_out(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    config = load_config(path)
    assert config.data.root == "https://me:hunter22@host/d?sig=abcdefabcdef"
    text = dump_config(config)
    assert "hunter22" not in text and "abcdefabcdef" not in text
    assert text.startswith("# Secrets were left out (***) of: data.root. To rerun, give these keys again.\n")
    copy = tmp_path / "copy.yaml"
    copy.write_text(text)
    from mmscale.config.checks import check_config

    with pytest.raises(ConfigError, match=r"^data\.root: expected a whole address.*data\.root=\.\.\.$"):
        check_config(load_config(copy), 1)
    check_config(load_config(copy, ["data.root=/data"]), 1)
    assert not dump_config(load_config(copy, ["data.root=/data"])).startswith("#")


def test_a_refused_config_does_not_say_its_secrets(tmp_path):
    """`seq_len` is given the address: the error shows what was found, and the error's text passes through `redact`."""
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["data.seq_len=https://me:hunter22@host/x"])
    assert "hunter22" in str(caught.value)
    assert "hunter22" not in redact.redact(str(caught.value))


def test_a_line_of_the_ledger_costs_little():
    """1000 sample ids; the figure in docs/security.md."""
    line = json.dumps({"step": 1, "ids": [f"train/text/shard-{n:06d}.tar:{n:09d}" for n in range(1000)]})
    hide(["hf_abcdefgh", "another-secret"])
    best = min(_seconds(line) for _ in range(20))
    print(f"{best * 1e3:.2f} ms for {len(line)} bytes")
    assert best < 0.02


def _seconds(line):
    started = time.process_time()
    redact.redact(line)
    return time.process_time() - started


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError(f"data.root={S3}: gone"), 2), (OSError(f"cannot read {S3}"), 1)]
)
def test_errors_of_the_commands_are_redacted(error, code, monkeypatch, capsys):
    """Ours as one line, others with their traceback; a token of the environment that the error repeats goes too."""
    from mmscale.cli import main as cli

    def fail(**_):
        raise type(error)(f"{error} with hf_abcdefgh")

    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    text = capsys.readouterr().err
    assert caught.value.code == code and "bucket.s3" in text and ("Traceback" in text) == (code == 1)
    assert "0a1b2c" not in text and "hf_abcdefgh" not in text
