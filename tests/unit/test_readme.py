"""What the README tells a reader to type works, with fewer steps."""

import ast
import functools
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import mtl_anagram
from mtl_anagram import cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = re.findall(r"^(?:    )?(mtl-anagram .*)$", README.replace("\\\n", " "), re.M)


def quicken(monkeypatch):
    """Two steps in the place of 30."""
    quick = functools.partial(mtl_anagram.generate_anagram, num_inference_steps=2)
    monkeypatch.setattr(mtl_anagram, "generate_anagram", quick)


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_blocks_run(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quicken(monkeypatch)
    names = {"__name__": "readme"}
    exec(PYTHON[number].replace("num_inference_steps=10", "num_inference_steps=2"), names)
    if "pictures" in names:
        assert names["pictures"].shape == (2, 3, 64, 64)
    elif "views" in names:
        x = torch.rand(2, 3, 64, 64)
        assert torch.equal(names["views"][1].inverse_view(names["views"][1].view(x)), x)
        assert names["views"][1].to_metadata()["arguments"] == {"bands": 4}
    else:
        assert sorted(p.name for p in tmp_path.glob("output/*/*.png")) == sorted(
            3 * ["sample_256.png", "sample_256.views.png", "sample_64.png", "sample_64.views.png"]
        )


def test_commands_run(tmp_path, monkeypatch, capsys):
    """In their order, in one folder: the last one repeats an earlier one's picture."""
    monkeypatch.chdir(tmp_path)
    embedded = [words for words in map(shlex.split, COMMANDS) if "--model" not in words]
    assert len(embedded) >= 4
    for words in embedded:
        if words[1] == "generate":
            words = [*words, "--steps", "1", "--overwrite"]  # of two --steps the last counts
        else:
            assert words[1] in ("repeat", "evaluate")
        if words[1] == "evaluate":
            words = [
                *words[: words.index("--pair-count")],
                "--pair-count",
                "1",
                "--seed",
                "0",
                "--views",
                "flip",
                "--steps",
                "1",
            ]
        # Seeds that another command of the page has written to the same folder stand for other prompts.
        assert cli.main([*words[1:], "--quiet"]) == 0, capsys.readouterr().err
    assert (tmp_path / "again/0001/sample_64.png").read_bytes() == (
        tmp_path / "output/0001/sample_64.png"
    ).read_bytes()


def test_commands_for_released_weights_are_understood():
    words = [words for words in map(shlex.split, COMMANDS) if "--model" in words]
    assert words
    for command in words:
        arguments = cli._parser().parse_args(command[1:])
        assert arguments.variant == "fp16"


def test_named_files_exist():
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.py")), ids=lambda path: path.stem)
def test_examples_run(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quicken(monkeypatch)
    quick = ["--pair-count", "1", "--seeds", "1", "--steps", "1"] if path.stem == "sheet" else []
    monkeypatch.setattr(sys, "argv", [str(path), *quick])
    code = path.read_text(encoding="utf-8").replace("num_inference_steps=20", "num_inference_steps=2")
    exec(
        compile(code, str(path), "exec"),
        {"__name__": "__main__", "__file__": str(path), "__doc__": ast.get_docstring(ast.parse(code))},
    )
    printed = capsys.readouterr().out
    pictures = [word for word in printed.split() if word.endswith(".png")]
    assert pictures
    assert all((tmp_path / picture).is_file() for picture in pictures)


def test_example_command_is_understood():
    for path in ROOT.glob("examples/*.sh"):
        line = next(x for x in path.read_text(encoding="utf-8").splitlines() if x.startswith("mtl-anagram"))
        assert cli._parser().parse_args(shlex.split(line)[1:]).prompts
