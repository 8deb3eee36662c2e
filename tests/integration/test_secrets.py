"""No secret of the environment, of a config or of a URL is in anything that a run writes or prints."""

import base64
import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "configs/recipes/digits.yaml"
PASSWORD, SIGNATURE, BEARER = "hunter2-of-url", "5f6e7d8c9b0a1f2e3d4c5b6a", "bearer-of-a-command"
ENV = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+bPxRfiCY", "HF_TOKEN": "hf_QwErTyUiOpAsDf", "MY_PASSWORD": "correct-horse",
}  # fmt: skip
SECRETS = [PASSWORD, SIGNATURE, BEARER, *ENV.values()]
SMALL = [
    "train.steps=3", "train.save_every=2", "train.warmup_steps=1", "train.global_batch=1", "data.seq_len=384", "data.window=32",
    "data.workers=1", "run.threads=1", "model.llm.config.num_hidden_layers=1", "model.vision.config.num_hidden_layers=1",
    "model.audio.config.encoder_layers=1", "eval.every=3", "eval.max_packs=1",
]  # fmt: skip
UNREDACTED = """
import mmscale.redact as r
r.redact, r.redact_values, r.bare_url = (lambda text: text), (lambda value: value), (lambda url: url)
from mmscale.cli.main import main
main()
"""


class Handler(SimpleHTTPRequestHandler):
    """Serves ranges to those who give the password and the signature; shards of `refused` to nobody."""

    refused = ""

    def do_GET(self):
        login = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
        name, _, query = self.path.partition("?")
        if self.headers["Authorization"] != f"Basic {login}" or query != f"sig={SIGNATURE}":
            return self.send_error(401)
        path = Path(self.translate_path(name))
        if not path.is_file() or (self.refused and self.refused in name):
            return self.send_error(404)
        data, status = path.read_bytes(), 200
        headers = {"ETag": "1"}
        if self.headers["Range"]:
            first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
            headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
            data, status = data[first : last + 1], 206
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def root(demo_data):
    """The address of the demo data, with its secrets."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(demo_data)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://me:{PASSWORD}@127.0.0.1:{server.server_port}/?sig={SIGNATURE}"
    Handler.refused = ""
    server.shutdown()
    thread.join()
    server.server_close()


def mmscale(*arguments, program=("-m", "mmscale")):
    env = {**os.environ, **ENV}
    done = subprocess.run(
        [sys.executable, *program, *arguments], env=env, capture_output=True, text=True, timeout=200, check=False
    )
    return done.returncode, done.stdout + done.stderr


def words(demo_data, run, root, *more):
    return [
        str(RECIPE),
        f"run.dir={run}",
        f"data.root={root}",
        f"model.tokenizer.path={demo_data}/tokenizer",
        *SMALL,
        *more,
    ]


def places(run, *texts):
    """Where a secret stands: in a file of the run, name or content, or in what was printed."""
    found = {f"printed {number}" for number, text in enumerate(texts) if any(secret in text for secret in SECRETS)}
    for path in Path(run).rglob("*"):
        if any(secret in path.name for secret in SECRETS):
            found.add(f"name of {path}")
        if path.is_file() and any(secret.encode() in path.read_bytes() for secret in SECRETS):
            found.add(str(path.relative_to(run)))
    return found


def test_a_run_on_a_secret_address_leaves_no_secret_behind(demo_data, tmp_path, root):
    run = tmp_path / "run"
    code, printed = mmscale("train", *words(demo_data, run, root))
    assert code == 0, printed
    assert "step 3/3" in printed and "goodput" in printed
    status = mmscale("status", str(run))
    report = mmscale("report", str(run))
    assert status[0] == report[0] == 0, status[1] + report[1]
    code, refused = mmscale("train", str(run / "config.yaml"), "train.steps=4")
    assert code == 2 and "data.root: expected a whole address" in refused
    assert places(run, printed, status[1], report[1], refused) == set()
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {"config.yaml", "ledger.jsonl", "metrics.jsonl", "checkpoints/step_00000003/trainer.json"} <= names
    assert "Secrets were left out (***) of: data.root" in (run / "config.yaml").read_text()

    # a second start with the address in a file of the user goes on, and is refused because the shards are gone
    config = tmp_path / "mine.yaml"
    config.write_text(f"include: [{RECIPE}]\ndata:\n  root: {root}\n")
    Handler.refused = ".tar"
    given = [word for word in words(demo_data, run, root)[1:] if not word.startswith("data.root")]
    code, failed = mmscale("train", str(config), *given, "train.steps=9")
    assert code == 2 and "http://127.0.0.1" in failed and "404" in failed, failed
    assert places(run, failed) == set()


def test_a_command_with_a_secret_leaves_none_behind(demo_data, tmp_path):
    run = tmp_path / "run"
    shards = f"{demo_data}/train/text/*.tar"
    command = f"pipe:true 'Authorization: Bearer {BEARER}' && cat {shards}"
    config = tmp_path / "mine.yaml"
    recipe = words(demo_data, run, demo_data, "eval.every=0", "data.seq_len=256")[1:]
    text = RECIPE.read_text().replace(", ../data/demo.yaml]", "]").replace("../model", str(RECIPE.parents[1] / "model"))
    text = re.sub(r"\neval:.*?\nrun:", "\nrun:", text, flags=re.S)
    source = f"\ndata:\n  sources:\n    x: {{mode: stream, allow_commands: true, path: {command!r}}}\n"
    config.write_text(text + source)
    code, printed = mmscale("train", str(config), *(word for word in recipe if not word.startswith("eval.max")))
    assert code == 0, printed
    config.write_text(text + source.replace("cat ", "cat /nowhere "))
    broken = tmp_path / "broken"
    recipe = [word.replace(str(run), str(broken)) for word in recipe if not word.startswith("eval.max")]
    code, failed = mmscale("train", str(config), *recipe)
    assert code == 1, failed
    assert places(run, printed) == places(broken, failed) == set()


def test_the_search_finds_them_when_nothing_is_taken_out(demo_data, tmp_path, root):
    run = tmp_path / "run"
    Handler.refused = "train/digits"
    code, printed = mmscale("train", *words(demo_data, run, root), program=("-c", UNREDACTED))
    assert code != 0
    Handler.refused = ""
    code, more = mmscale("train", *words(demo_data, run, root), program=("-c", UNREDACTED))
    assert code == 0, more
    found = places(run, printed)
    assert {"printed 0", "config.yaml", "checkpoints/step_00000003/trainer.json"} <= found, found
