"""The package as a whole: what it imports, what importing it touches, what it promises by name."""

import ast
import graphlib
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import mtl_anagram
from tests import sizes

PACKAGE = Path(mtl_anagram.__file__).resolve().parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
OPTIONAL = "triton"  # which files named after it, and imported where it is asked for, may need
MODULES = [m.name for m in pkgutil.walk_packages([str(PACKAGE)], "mtl_anagram.") if OPTIONAL not in m.name]
REFERENCES = {"diffusers", "transformers", "torchvision"}
REQUIREMENTS = {"torch", "safetensors", "huggingface_hub", "sentencepiece", "einops", "pillow", "tqdm"}
# Arrows run down only: what each part may import of the others.
HOUSE = ("__main__", "evaluation", "generate", "cascade", "models", "files", "errors")
BELOW = {part: set(HOUSE[i + 1 :]) for i, part in enumerate(HOUSE)}
for upper in HOUSE[:4]:
    BELOW[upper] |= {"sampling", "views"}
BELOW |= {"sampling": {"errors"}, "views": {"errors"}}


def run(script, tmp_path):
    """Run a script in a new process with a fresh home; returns its stdout."""
    home = tmp_path / "home"
    home.mkdir()
    kept = {"PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV"} & set(os.environ)
    environment = {name: os.environ[name] for name in kept} | {"HOME": str(home), "USERPROFILE": str(home)}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.rglob("*")) == [home]
    return done.stdout


def test_importing_touches_nothing(tmp_path):
    script = """
import random, socket, sys, threading
import torch

def refuse(*args, **kwargs):
    raise AssertionError("a socket was opened")

socket.socket.__init__ = socket.create_connection = socket.getaddrinfo = refuse

def state():
    return (
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_rng_state().tolist(),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        torch.backends.cudnn.benchmark, torch.get_default_device(),
        random.getstate(), sys.path[:], threading.active_count(), torch.cuda.is_initialized(),
    )

before = state()
import mtl_anagram
assert state() == before
assert mtl_anagram.get_views(["identity"])  # the names are there
"""
    run(script, tmp_path)


def test_help_needs_no_torch(tmp_path):
    script = """
import contextlib, sys
from mtl_anagram.__main__ import main
with contextlib.suppress(SystemExit):
    main(["--help"])
assert not {"torch", "PIL", "huggingface_hub"} & set(sys.modules)
"""
    assert "generate" in run(script, tmp_path)


def test_all_modules_import_where_only_the_requirements_are_installed(tmp_path):
    script = f"""
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(REFERENCES | {OPTIONAL, "numpy", "scipy", "accelerate", "matplotlib"})}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
for name in {MODULES}:
    importlib.import_module(name)
"""
    assert len(MODULES) > 40
    run(script, tmp_path)


def module_of(path):
    parts = ["mtl_anagram", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """The absolute names of all modules that a file imports, at the top or within functions; not for types alone."""
    package = ["mtl_anagram", *path.relative_to(PACKAGE).parent.parts]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed = (n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    for_types = {id(inner) for node in typed for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_modules_import_requirements_alone_and_say_what_they_are():
    allowed = REQUIREMENTS - {"pillow"} | {"PIL", "mtl_anagram"} | set(sys.stdlib_module_names)
    for path in FILES:
        more = {OPTIONAL} if OPTIONAL in path.name else set()
        assert {name.partition(".")[0] for name in imports(path)} <= allowed | more, path
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_arrows_run_one_way():
    for path in FILES:
        part = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if part == "__init__":
            continue  # which hands out names, each when it is asked for
        for name in imports(path):
            other = name.split(".")[1] if name.startswith("mtl_anagram.") else part
            if other in BELOW:
                assert other == part or other in BELOW[part], f"{path} imports {name}"


def test_no_circle():
    """Of modules, also through an import within a function."""
    known = {module_of(path): path for path in FILES if path != PACKAGE / "__init__.py"}
    graph = {}
    for module, path in known.items():
        found, package = set(imports(path)), module.rpartition(".")[0]
        graph[module] = {name for name in found if name in known and name != module}
        # `from . import x` asks the package for its module x; only for another name must it be there before.
        asked = {name for name in found if name.rpartition(".")[0] == package}
        if path.name != "__init__.py" and asked <= known.keys():
            graph[module].discard(package)
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(known)


PROMISED = {
    "mtl_anagram": "generate_anagram Cascade Recipe get_views",
    "mtl_anagram.models": "load_unet load_t5 load_tokenizer load_noise_clip",
    "mtl_anagram.models.noise_clip": "HEAD_SIZE",
    "mtl_anagram.models.unet": "UNet UNetConfig",
    "mtl_anagram.sampling": "balance rectify anti_segregation_loss ddpm_step sample Schedule sample_stage1 "
    "sample_stage2",
}


def test_promised_names():
    for module, names in PROMISED.items():
        assert all(hasattr(importlib.import_module(module), name) for name in names.split()), module


def test_sizes():
    """The root's entries, the longest file, and the README; `python -m tests.sizes` prints all of them."""
    found = sizes.sizes()
    for name in ("entries of the package's root", "longest file", "README lines"):
        assert found[name][0] <= sizes.LIMITS[name], (name, found[name])


def test_what_is_installed():
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (call,) = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "setup")
    arguments = {keyword.arg: keyword.value for keyword in call.keywords}
    required = [line.partition(">=")[0] for line in ast.literal_eval(arguments["install_requires"])]
    assert sorted(required) == sorted(REQUIREMENTS)
    extras = ast.literal_eval(arguments["extras_require"])
    assert {"diffusers", "transformers"} <= {line.partition(">=")[0] for line in extras["test"]}
    command = "mtl-anagram = mtl_anagram.__main__:main"
    assert ast.literal_eval(arguments["entry_points"]) == {"console_scripts": [command]}
    assert {"author", "url", "project_urls", "classifiers", "keywords"} <= set(arguments)
    packed = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    assert all(name in packed for name in ("constraints.txt", "weights", "README.md", "LICENSE"))
    assert (PACKAGE / "py.typed").is_file()
