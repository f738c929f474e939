"""The package as a whole: what it imports, what importing it touches, what it promises by name."""

import ast
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import mtl_anagram

PACKAGE = Path(mtl_anagram.__file__).resolve().parent
ROOT = PACKAGE.parent
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(PACKAGE)], "mtl_anagram."))
REFERENCES = {"diffusers", "transformers", "torchvision"}
REQUIREMENTS = {"torch", "safetensors", "huggingface_hub", "sentencepiece", "einops", "pillow", "tqdm"}


def run(script, tmp_path):
    """Run a script in a new process with a fresh home; returns its stdout."""
    home = tmp_path / "home"
    home.mkdir()
    kept = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"HOME": str(home), "USERPROFILE": str(home), "PYTHONPATH": str(ROOT)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
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
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted({"diffusers", "transformers", "torchvision"} & loaded))
"""
    assert run(script, tmp_path) == "[]\n"


def test_all_modules_import_where_only_the_requirements_are_installed(tmp_path):
    script = f"""
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(REFERENCES | {"numpy", "scipy", "accelerate", "matplotlib"})}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
for name in {MODULES}:
    importlib.import_module(name)
print(len(sys.modules))
"""
    assert int(run(script, tmp_path)) > len(MODULES)


def imports(path):
    """The absolute names of all modules that a file imports, at the top or within functions."""
    package = ["mtl_anagram", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_the_reading_of_imports():
    """The tests below say nothing if `imports` misses some."""
    found = set(imports(PACKAGE / "output.py"))
    assert {"torch", "mtl_anagram.cascade", "mtl_anagram.views", "mtl_anagram.models.sources"} <= found
    assert "mtl_anagram.__version__" in found  # within a function
    assert "mtl_anagram.errors" in set(imports(PACKAGE / "sampling" / "stages.py"))


def test_only_requirements_are_imported():
    allowed = REQUIREMENTS - {"pillow"} | {"PIL", "mtl_anagram"} | set(sys.stdlib_module_names)
    for path in PACKAGE.rglob("*.py"):
        assert {name.partition(".")[0] for name in imports(path)} <= allowed, path


@pytest.mark.parametrize(
    "package, others",
    [
        ("sampling", {"models", "views", "generate", "cascade", "cli", "media", "prompts"}),
        ("models", {"sampling", "views", "generate", "cascade", "cli", "media", "prompts"}),
        ("views", {"sampling", "models", "generate", "cascade", "cli", "media", "prompts"}),
    ],
)
def test_arrows_run_one_way(package, others):
    files = list((PACKAGE / package).rglob("*.py"))
    assert len(files) > 3
    for path in files:
        for name in imports(path):
            parts = name.split(".")
            assert parts[0] != "mtl_anagram" or not others & set(parts[1:2]), f"{path} imports {name}"


@pytest.mark.parametrize(
    "name",
    [
        *("mtl_anagram", "mtl_anagram.models", "mtl_anagram.models.upscaler"),
        *("mtl_anagram.sampling", "mtl_anagram.views"),
    ],
)
def test_public_names_exist(name):
    module = importlib.import_module(name)
    assert len(module.__all__) == len(set(module.__all__))
    assert all(hasattr(module, public) for public in module.__all__)
    assert module.__doc__


def test_promised_names():
    from mtl_anagram import Cascade, Recipe, generate_anagram, get_views  # noqa: F401
    from mtl_anagram.models import load_noise_clip, load_t5, load_tokenizer, load_unet  # noqa: F401
    from mtl_anagram.sampling import (  # noqa: F401
        Schedule,
        anti_segregation_loss,
        balance,
        ddpm_step,
        rectify,
        sample_stage1,
        sample_stage2,
    )


def test_every_module_says_what_it_is():
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def setup_arguments():
    """The keyword arguments of setup.py's call of setup(), as syntax trees."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (call,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup"
    )
    return {keyword.arg: keyword.value for keyword in call.keywords}


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="an installed package has no setup.py")
def test_requirements_of_the_package():
    arguments = setup_arguments()
    required = ast.literal_eval(arguments["install_requires"])
    assert len(required) == len(REQUIREMENTS)
    assert {line.partition(">=")[0] for line in required} == REQUIREMENTS
    extras = ast.literal_eval(arguments["extras_require"])
    assert {"diffusers", "transformers"} <= {line.partition(">=")[0] for line in extras["test"]}
    assert ast.literal_eval(arguments["entry_points"]) == {
        "console_scripts": ["mtl-anagram = mtl_anagram.cli:main"]
    }


def test_the_type_marker_is_there():
    assert (PACKAGE / "py.typed").is_file()
