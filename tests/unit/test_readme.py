"""What the README and the examples tell a reader to type works: in its order, in one folder, with fewer steps."""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest
import torch

import mtl_anagram
from mtl_anagram import __main__ as command
from mtl_anagram.evaluation.batch import read_requests
from tests import api_page, readme
from tests.readme import README, ROOT

HOME = re.search(r'^HOME = "(.+)"$', (ROOT / "setup.py").read_text(encoding="utf-8"), re.M)[1]
RAW = HOME.replace("github.com", "raw.githubusercontent.com")
EXAMPLES = sorted(ROOT.glob("examples/*.py"))


def run_example(path, monkeypatch, capsys):
    """An example's printed pictures, made with two steps."""
    quick = ["--count", "1", "--seeds", "1"] if path.stem == "sheet" else []
    monkeypatch.setattr(sys, "argv", [str(path), *quick])
    code, names = readme.quick_python(path.read_text(encoding="utf-8")), {"__name__": "__main__"}
    exec(compile(code, str(path), "exec"), names | {"__doc__": ast.get_docstring(ast.parse(code))})
    return [word.rstrip(":") for word in capsys.readouterr().out.split() if ".png" in word]


def test_page_and_examples_in_one_folder(tmp_path, monkeypatch, capsys):
    """Commands, Python blocks and examples one after the other: no folder collides with another request's."""
    monkeypatch.chdir(tmp_path)
    words_of = readme.embedded_commands()
    assert [words[0] for words in words_of] == ["generate", "generate", "repeat", "generate", "evaluate"]
    for words in words_of:
        assert command.main(readme.quick_command(words)) == 0, capsys.readouterr().err
    shown, warned = capsys.readouterr()
    assert "differ" not in warned  # the repeated picture is the recorded one
    assert shown.count("sample_256.png") == 4
    again, first = next(tmp_path.glob("repeated/*/0014/sample_256.png")), "glasses/0014/sample_256.png"
    assert again.read_bytes() == (tmp_path / first).read_bytes()

    quick = functools.partial(mtl_anagram.generate_anagram, num_inference_steps=2)
    monkeypatch.setattr(mtl_anagram, "generate_anagram", quick)
    for path in EXAMPLES:
        made = run_example(path, monkeypatch, capsys)
        assert made, path
        assert all((tmp_path / picture).is_file() for picture in made), path


def test_python_blocks(tmp_path, monkeypatch, capsys):
    """Each by itself; the loop that the page writes is the one that the library runs."""
    monkeypatch.chdir(tmp_path)
    made = [{"__name__": "page"} for _ in readme.python_blocks()]
    for names, code in zip(made, readme.python_blocks(), strict=True):
        exec(readme.quick_python(code), names)
    call, memory, loop, view = made
    assert sorted(path.parent.name for path in tmp_path.glob("plants/*/sample_256.png")) == ["0007"]
    assert call["made"][0].pictures[256] == Path("plants/0007/sample_256.png")
    assert memory["picture"].shape == (1, 3, 64, 64)
    recipe = mtl_anagram.Recipe.released(num_inference_steps=2, guidance_scale=5.0, anti_segregation=False)
    run = loop["cascade"].sample(
        ["a duck", "a house"], loop["views"], 7, style="a poster of", recipe=recipe, stop_after=64
    )
    torch.testing.assert_close(loop["x"], run.pictures[64], atol=1e-4, rtol=0)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(view["views"][1].inverse_view(view["views"][1].view(x)), x)


def test_commands_for_released_weights_are_understood():
    pages = [README, *(path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md"))]
    released = [words for page in pages for words in readme.commands(page) if "--model" in words]
    assert len(released) > 2
    for words in released:
        assert command._parser().parse_args(words).model


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "weights/README.md", *ROOT.glob("docs/*.md")])
def test_links(path):
    page = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    for link in links:
        place, _, anchor = link.partition("#")
        for prefix in (f"{HOME}/blob/main/", f"{HOME}/tree/main/", f"{RAW}/main/"):
            if place.startswith(prefix):
                found = ROOT / place.removeprefix(prefix)
                break
        else:
            if place.startswith("http"):
                continue
            assert path.name != "README.md" or path.parent != ROOT, f"{link} must be absolute"
            found = (path.parent / place) if place else path
        assert found.exists(), link
        if anchor and found.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert anchor in anchors, link


def test_example_commands_are_understood():
    embedded = mtl_anagram.Cascade.from_pretrained(device="cpu")
    assert len(read_requests(ROOT / "docs/sheet.jsonl", embedded)) == 24
    for path in ROOT.glob("examples/*.sh"):
        (words,) = readme.commands(path.read_text(encoding="utf-8"))
        assert command._parser().parse_args(words).prompts


def test_glide_files_as_published(tmp_path):
    readme.write_glide(tmp_path / "glide")
    from mtl_anagram.models import load_noise_clip

    score = load_noise_clip(tmp_path / "glide").scorer(["a duck"])
    assert score(torch.zeros(1, 1, 3, 64, 64), 0).shape == (1, 1)


def test_api_page_is_up_to_date():
    assert api_page.PAGE.read_text(encoding="utf-8") == api_page.page(), "python -m tests.api_page"
