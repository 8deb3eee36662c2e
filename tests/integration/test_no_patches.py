"""mmscale plugs into the libraries by their registries only: importing it and training change nothing inside them."""

import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).parents[2] / "configs/recipes/digits.yaml"

SCRIPT = """
import importlib, sys, types
NAMES = ["torch", "torch.nn.functional", "torch.optim", "torch.optim.adamw", "torch.distributed", "torch.nn.modules.module",
         "transformers.modeling_utils", "transformers.masking_utils", "transformers.integrations.sdpa_attention",
         "transformers.models.llama.modeling_llama", "transformers.models.siglip.modeling_siglip",
         "transformers.models.whisper.modeling_whisper", "transformers.models.llava.modeling_llava"]

def snapshot():
    found = {}
    for name in NAMES:
        module = importlib.import_module(name)
        for key, value in list(vars(module).items()):
            if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
                found[name, key] = id(value)
            elif isinstance(value, type) and value.__module__ == name:
                for method, body in vars(value).items():
                    if callable(body):
                        found[name, key, method] = (id(body), id(getattr(body, "__code__", None)))
    return found

importlib.import_module("torch._dynamo")  # replaces torch.manual_seed itself, whenever it is first needed
before = snapshot()
from mmscale.config.load import load_config
from mmscale.config.schema import ParallelConfig
from mmscale.parallel.mesh import init_mesh
from mmscale.train.loop import train
train(load_config(sys.argv[1], sys.argv[2:]), init_mesh(ParallelConfig(), "cpu"))
after = snapshot()
changed = sorted(k for k in before if before[k] != after.get(k))
print(len(before), "looked at; changed:", changed)
torch = importlib.import_module("torch")
torch.nn.functional.relu = lambda x: x
assert any(before[k] != v for k, v in snapshot().items() if k in before), "the comparison must be able to fail"
sys.exit(bool(changed))
"""


def test_libraries_are_left_as_they_were(demo_data, tmp_path):
    words = [
        f"data.root={demo_data}", f"run.dir={tmp_path / 'run'}", "train.steps=2", "train.warmup_steps=0", "train.global_batch=1",
        "data.seq_len=256", "data.window=64", "data.workers=0", "eval.every=0", "run.tensorboard=false", "run.threads=1",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(RECIPE), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert int(done.stdout.split()[0]) > 500
