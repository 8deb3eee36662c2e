"""The house: import order, no cycles, no star imports, symlinks, optional packages, light imports."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PACKAGE = REPO / "mmscale"

# what a package may import: itself and everything on an earlier line
ORDER = [
    {"errors", "types", "registry", "redact", "logging", "figure"},
    {"config"},
    {"kernels", "streaming"},
    {"model"},
    {"parallel"},
    {"train"},
    {"eval", "serve", "cluster"},
    {"cli"},
]
NEVER = {
    "streaming": {"kernels"},
    "kernels": {"errors", "types", "registry", "redact", "logging", "figure", "config", "streaming"},
    "model": {"streaming"},
    "data_tools": {"kernels", "model", "parallel", "train", "eval", "serve", "cluster", "cli"},
}
OPTIONAL = (
    "deepspeed",
    "megatron",
    "flash_attn",
    "triton",
    "torchaudio",
    "peft",
    "bitsandbytes",
    "sklearn",
    "matplotlib",
    "simplejpeg",
    "fsspec",
    "s3fs",
    "pyarrow",
    "liger_kernel",
)

TRITON_FOLDER = "mmscale.kernels.triton_kernels"


def modules():
    """(dotted name, path) of every module, through the symlinks."""
    for folder, _, files in os.walk(PACKAGE, followlinks=True):
        for file in sorted(files):
            path = Path(folder) / file
            if path.suffix == ".py":
                parts = path.relative_to(REPO).with_suffix("").parts
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def imports(path, top_only=False):
    """(imported module, from-names) of every import statement of a file, inside functions too; typing-only ones left out."""
    tree = ast.parse(path.read_text())
    typing_only = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            typing_only |= {id(n) for n in ast.walk(node)}
    for node in tree.body if top_only else ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module, tuple(a.name for a in node.names)


def area(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def level(name):
    return next(i for i, group in enumerate(ORDER) if name in group)


def test_there_is_something_to_check():
    assert len(MODULES) > 40
    assert {"mmscale.kernels", "mmscale.data_tools"} <= set(MODULES)


def allowed(user, used):
    """Whether package `user` may import package `used`."""
    if used == user:
        return True
    if used in NEVER.get(user, ()):
        return False
    if user == "data_tools":
        return level(used) <= level("streaming")
    return used != "data_tools" and level(used) < level(user)


@pytest.mark.parametrize("name", [m for m in MODULES if area(m) not in ("", "__main__")])
def test_imports_go_one_way(name):
    user = area(name)
    for module, names in imports(MODULES[name]):
        if module == "mmscale":
            used = {n for n in names if not n.startswith("__")}
        elif module.startswith("mmscale."):
            used = {area(module)}
        else:
            continue
        for one in used:
            if user == "cli" and one == "data_tools":
                continue
            if user in ORDER[0]:
                assert one in ORDER[0], f"{name} imports {module}"
            else:
                assert allowed(user, one), f"{name} imports {module}: {one} does not come before {user}"


def test_the_order_check_can_fail():
    assert not allowed("model", "streaming")
    assert not allowed("streaming", "train")
    assert not allowed("kernels", "errors")
    assert not allowed("data_tools", "model")
    assert allowed("train", "parallel")


def test_no_module_cycles():
    graph = {}
    for name, path in MODULES.items():
        graph[name] = set()
        for module, names in imports(path, top_only=True):
            graph[name] |= {m for m in (module, *(f"{module}.{n}" for n in names)) if m in MODULES and m != name}
    state = {}

    def visit(node, trail):
        if state.get(node) == "done":
            return
        assert state.get(node) != "open", f"import cycle: {' -> '.join([*trail, node])}"
        state[node] = "open"
        for child in sorted(graph[node]):
            # importing a submodule also runs its package's __init__, which must stay below it
            visit(child, [*trail, node])
        state[node] = "done"

    for node in sorted(graph):
        visit(node, [])


@pytest.mark.parametrize("name", MODULES)
def test_no_star_imports(name):
    assert all("*" not in names for _, names in imports(MODULES[name]))


@pytest.mark.parametrize("package", OPTIONAL)
def test_optional_packages_have_one_door(package):
    users = [name for name, path in MODULES.items() if any(m.split(".")[0] == package for m, _ in imports(path))]
    if package == "triton":  # a kernel is defined where its module is imported: its folder is the door
        users = [name for name in users if not name.startswith(f"{TRITON_FOLDER}.")]
        doors = [
            name
            for name, path in MODULES.items()
            if any(m.startswith(TRITON_FOLDER) for m, _ in imports(path, top_only=True))
        ]
        assert not [name for name in doors if not name.startswith(TRITON_FOLDER)], "imported inside a function"
    at_top = [
        name for name in users if any(m.split(".")[0] == package for m, _ in imports(MODULES[name], top_only=True))
    ]
    assert len(users) <= 1, f"{package} is imported in {users}"
    assert not at_top, f"{package} must be imported inside a function: {at_top}"


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("kernels", "../kernels/mmscale_kernels"),
        ("data_tools", "../data_tools/mmscale_data_tools"),
        ("configs", "../configs"),
        ("slurm", "../slurm"),
    ],
)
def test_symlinks_are_relative_and_resolve(link, target):
    path = PACKAGE / link
    assert path.is_symlink()
    assert str(path.readlink()) == target
    assert path.resolve().is_dir()


@pytest.mark.parametrize("from_repo", [False, True], ids=["installed", "from_the_checkout"])
def test_hugging_faces_kernels_package_is_not_shadowed(tmp_path, from_repo):
    """Installed, the name `kernels` is free; in the checkout's own folder Python sees a bare directory, never a package."""
    assert not (REPO / "kernels/__init__.py").exists()
    code = f"""
import importlib.util
spec = importlib.util.find_spec("kernels")
if {from_repo}:
    assert spec is None or spec.origin is None or not spec.origin.startswith({str(REPO)!r}), spec
else:
    assert spec is None or not any(p.startswith({str(REPO)!r}) for p in spec.submodule_search_locations), spec
import mmscale.kernels
from transformers import LlamaForCausalLM
from transformers.utils import is_kernels_available
assert mmscale.kernels.__file__.startswith({str(REPO)!r})
assert spec is not None and spec.origin is not None or not is_kernels_available()
"""
    cwd = REPO if from_repo else tmp_path
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_import_is_light():
    heavy = (
        "torch",
        "transformers",
        "numpy",
        "deepspeed",
        "megatron",
        "triton",
        "flash_attn",
        "torchaudio",
        "pydantic",
    )
    code = f"import sys, mmscale, mmscale.cli.main, mmscale.train.signals\nprint([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_environment_is_read_in_one_module():
    readers = [
        name
        for name, path in MODULES.items()
        if any(
            isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv")
            for n in ast.walk(ast.parse(path.read_text()))
        )
    ]
    # kernels import nothing of mmscale, so the choice among them is read there
    assert readers == ["mmscale.config.env", "mmscale.kernels.dispatch"], readers


@pytest.mark.parametrize("name", MODULES)
def test_no_unsafe_calls(name):
    """No eval, exec or pickle.load but between processes of one run; torch.load only with weights_only=True."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            if (name, call) == ("mmscale.streaming.transport", "pickle.loads"):
                continue
            assert call not in ("eval", "exec", "pickle.load", "pickle.loads", "os.system"), (
                f"{name}:{node.lineno}: {call}"
            )
            if call == "torch.load":
                assert "weights_only=True" in ast.unparse(node), (
                    f"{name}:{node.lineno}: torch.load without weights_only=True"
                )
            assert "shell=True" not in ast.unparse(node), f"{name}:{node.lineno}: a shell is started"


@pytest.mark.parametrize("name", MODULES)
def test_sizes_stay_readable(name):
    source = MODULES[name].read_text()
    assert source.count("\n") <= 700, "split the file"
    if name == "mmscale.train.loop":
        assert source.count("\n") <= 400
    if name == "mmscale.model.composite":
        assert source.count("\n") <= 300
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 120, f"{name}: {node.name} is too long"
