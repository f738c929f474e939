"""The command: what its options reach, what it prints, and how it ends."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mtl_anagram
from mtl_anagram import InputError, Recipe
from mtl_anagram.cli import main, parse_seeds
from mtl_anagram.generate import Anagram

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(mtl_anagram.__file__).resolve().parents[1]
READINGS = ["a duck", "a rabbit", "--views", "identity", "rotate_ccw"]


@pytest.fixture
def generate(cascade_folder, tmp_path):
    """generate(*more) runs the command with two prompts and the tiny cascade, small and on the CPU."""

    def call(*more, readings=READINGS, out="out", model=cascade_folder):
        given = [
            "generate",
            *readings,
            "--model",
            str(model),
            "--out",
            str(tmp_path / out),
            "--device",
            "cpu",
        ]
        small = {"--size": "16", "--steps": "1", "--stop-after": "16"}
        for option, value in small.items():
            if option not in more:
                given += [option, value]
        return main([*given, *more])

    return call


def request(folder, seed=0):
    return json.loads((folder / f"{seed:04d}" / "metadata.json").read_text())["request"]


@pytest.mark.parametrize(
    "words, seeds",
    [
        (["0"], [0]),
        (["9", "12", "20-22"], [9, 12, 20, 21, 22]),
        (["3-3", "007"], [3, 7]),
        (["5-6", "6-7"], [5, 6, 6, 7]),
        ([str(2**63 - 1)], [2**63 - 1]),
        (["0-99999"], list(range(100_000))),
    ],
)
def test_parse_seeds(words, seeds):
    assert parse_seeds(words) == seeds


@pytest.mark.parametrize(
    "word", ["", "-", "-1", "1-", "a", "1.5", "3-2", "1-2-3", "1,2", " 1", "²", "0-100000", "+1"]
)
def test_seeds_that_are_none(word):
    with pytest.raises(InputError, match="--seed"):
        parse_seeds(["4", word])


def test_seeds_and_ranges(generate, tmp_path, capsys):
    assert generate("--seed", "9", "12", "20-22", "12", "--quiet") == 0
    folders = [f"{seed:04d}" for seed in (9, 12, 20, 21, 22)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == folders
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    for line, folder in zip(lines, folders, strict=True):
        picture, views = line.split("  ")
        assert Path(picture) == tmp_path / "out" / folder / "sample_16.png"
        assert Path(picture).is_file()
        assert (Path(picture).parent / views).is_file()


def test_both_stages(generate, tmp_path, capsys):
    assert generate("--stop-after", "64", "--quiet") == 0
    shown = capsys.readouterr()
    assert [Path(line.split("  ")[0]).name for line in shown.out.splitlines()] == [
        "sample_16.png",
        "sample_64.png",
    ]
    assert shown.err == ""
    assert json.loads((tmp_path / "out" / "0000" / "metadata.json").read_text())["sizes"] == [16, 64]


def test_the_folder_is_output_unless_named(cascade_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--size", "16", "--steps", "1", "--stop-after", "16", "--model", str(cascade_folder), "--quiet"]
    assert main(["generate", *READINGS, *small, "--device", "cpu"]) == 0
    picture = capsys.readouterr().out.split("  ")[0]
    assert picture == os.path.join("output", "0000", "sample_16.png")
    assert Path(picture).is_file()


RELEASED = Recipe.released()


@pytest.mark.parametrize(
    "options, recipe",
    [
        ([], RELEASED),
        (["--recipe", "released"], RELEASED),
        (["--recipe", "corrected"], Recipe.corrected()),
        (["--recipe", "plain"], Recipe.plain()),
        (["--no-balancing"], Recipe.released(balancing=False)),
        (["--no-rectification"], Recipe.released(rectification=False)),
        (["--no-anti-segregation"], Recipe.released(anti_segregation=False)),
        (["--recipe", "plain", "--balancing"], Recipe.plain(balancing=True)),
        (["--recipe", "plain", "--rectification", "--anti-segregation"], Recipe.released(balancing=False)),
        (["--guidance-scale", "7.5"], Recipe.released(guidance_scale=7.5)),
        (["--steps", "2"], Recipe.released(num_inference_steps=2)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_recipe(generate, tmp_path, options, recipe):
    assert generate(*options, "--quiet") == 0
    expected = recipe.to_dict()
    expected["num_inference_steps"] = 2 if "--steps" in options else 1
    assert request(tmp_path / "out")["recipe"] == expected


@pytest.fixture
def asked(monkeypatch):
    """What the command asks of generate_anagram, which does nothing here."""
    seen = {}

    def stand_in(style, prompts, views, save_dir, **options):
        seen.update(style=style, prompts=prompts, views=views, save_dir=save_dir, **options)
        return []

    monkeypatch.setattr("mtl_anagram.generate.generate_anagram", stand_in)
    return seen


@pytest.mark.parametrize("steps, scale", [("30", "10"), ("50", "2"), (None, None)])
def test_steps_and_scale_go_before_the_cascades_own(cascade_folder, tmp_path, asked, steps, scale):
    """Also where they equal the library's defaults, which a call of generate_anagram cannot tell."""
    own = shutil.copytree(cascade_folder, tmp_path / "own")
    recipe = {"num_inference_steps": 7, "guidance_scale": 3.0, "rectification": False}
    (own / "cascade.json").write_text(json.dumps({"recipe": recipe}))
    options = [] if steps is None else ["--steps", steps, "--guidance-scale", scale]
    assert main(["generate", *READINGS, "--model", str(own), "--device", "cpu", *options]) == 0
    expected = Recipe.released(**recipe)
    if steps is not None:
        expected = Recipe.released(
            num_inference_steps=int(steps), guidance_scale=float(scale), rectification=False
        )
    assert asked["recipe"] == expected
    # The arguments of the same names, left out, change nothing any more.
    assert asked.get("num_inference_steps", 30) == 30
    assert asked.get("guidance_scale", 10.0) == 10.0


def test_every_option_arrives(cascade_folder, asked):
    options = {
        "--style": "a sketch of",
        "--view-args": '[null, {"seed": 3}]',
        "--noise-level": "70",
        "--size": "32",
        "--stop-after": "32",
        "--batch-size": "7",
        "--out": "elsewhere",
        "--model": str(cascade_folder / "stage_1"),
        "--stage-2": str(cascade_folder / "stage_2"),
        "--noise-clip": str(cascade_folder / "noise_clip"),
        "--variant": "fp16",
        "--device": "cpu",
        "--dtype": "bfloat16",
    }
    readings = ["a duck", "a rabbit", "--views", "identity", "jigsaw", "--concepts", "duck", "a"]
    flat = [word for pair in options.items() for word in pair]
    assert main(["generate", *readings, *flat, "--seed", "1-3", "--overwrite", "--quiet"]) == 0
    cascade = asked.pop("model")
    assert (cascade.has_stage_2, cascade.has_noise_clip, cascade.variant) == (True, True, "fp16")
    assert (str(cascade.device), str(cascade.dtype)) == ("cpu", "torch.bfloat16")
    assert asked == {
        "style": "a sketch of",
        "prompts": ["a duck", "a rabbit"],
        "views": ["identity", "jigsaw"],
        "save_dir": "elsewhere",
        "seed": [1, 2, 3],
        "noise_level": 70,
        "view_args": [None, {"seed": 3}],
        "recipe": RELEASED,
        "upscale": None,
        "concepts": ["duck", "a"],
        "stop_after": 32,
        "size": 32,
        "batch_size": 7,
        "overwrite": True,
        "progress": False,
    }


def test_options_left_out_are_the_librarys_defaults(cascade_folder, asked):
    assert main(["generate", *READINGS, "--model", str(cascade_folder), "--device", "cpu"]) == 0
    assert asked.pop("model").recipe == asked.pop("recipe")
    assert asked.pop("seed") == [0]
    assert asked.pop("progress") is True
    defaults = inspect.signature(mtl_anagram.generate_anagram).parameters
    names = (
        "noise_level",
        "view_args",
        "concepts",
        "stop_after",
        "size",
        "batch_size",
        "overwrite",
        "upscale",
    )
    for name in names:
        assert asked[name] == defaults[name].default, name


def test_views_style_and_concepts_reach_the_picture(generate, tmp_path):
    readings = ["a big duck", "a [rabbit]", "--views", "identity", "patch_permute+flip"]
    options = ["--view-args", '[null, {"patch_permute": {"num_patches": 4, "seed": 11}}]']
    assert generate(*options, "--style", "a sketch of", "--quiet", readings=readings) == 0
    made = request(tmp_path / "out")
    assert made["prompts"] == ["a sketch of a big duck", "a sketch of a rabbit"]
    assert made["concepts"] == [None, "rabbit"]
    assert made["views"][1]["views"][0]["arguments"] == {"num_patches": 4, "seed": 11}
    readings = ["a big duck", "a rabbit", "--views", "identity", "flip"]
    assert generate("--concepts", "big", "rabbit", "--quiet", readings=readings, out="b") == 0
    assert request(tmp_path / "b")["concepts"] == ["big", "rabbit"]


def test_the_progress_bar(generate, capsys):
    assert generate("--steps", "2", "--seed", "0", "1") == 0
    shown = capsys.readouterr()
    assert "stage I, seed 0..1" in shown.err
    assert "4/4" in shown.err
    assert len(shown.out.splitlines()) == 2
    assert generate("--steps", "2", "--quiet", out="b") == 0
    assert capsys.readouterr().err == ""


def test_a_second_time(generate, tmp_path, capsys):
    assert generate("--quiet") == 0
    first = capsys.readouterr().out
    assert "(was there)" not in first
    assert generate("--quiet") == 0
    assert capsys.readouterr().out == first.rstrip("\n") + "  (was there)\n"
    assert generate("--quiet", "--style", "a photo of") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("mtl-anagram: error: ")
    assert "another request's pictures" in shown.err
    assert "--overwrite" in shown.err
    assert request(tmp_path / "out")["style"] == ""
    assert generate("--quiet", "--style", "a photo of", "--overwrite") == 0
    assert "(was there)" not in capsys.readouterr().out
    assert request(tmp_path / "out")["style"] == "a photo of"


@pytest.mark.parametrize(
    "options, match",
    [
        (["--seed", "x"], "--seed 'x'"),
        (["--view-args", "{"], "is not JSON"),
        (["--view-args", "[1]"], "view_args has 1 entries for 2 views"),
        (["--steps", "0"], "num_inference_steps=0"),
        (["--size", "17"], "multiple of 8"),
        (["--stop-after", "100"], "stop_after=100"),
        (["--noise-level", "1000"], "noise_level=1000"),
        (["--guidance-scale", "nan"], "guidance_scale"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--device", "toaster"], "'toaster' is no device"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--concepts", "duck"], "a list of 2"),
        (["--concepts", "elephant", "rabbit"], "elephant"),
        (["--model", "no/where/at/all"], "no folder on this machine"),
        (["--variant", "../fp16"], "variant"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_with_status_2_and_one_line(generate, tmp_path, capsys, options, match):
    assert generate(*options) == 2
    shown = capsys.readouterr()
    assert match in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert shown.out == ""
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_written_ends_with_status_2(generate, tmp_path, capsys):
    (tmp_path / "out").write_bytes(b"")
    assert generate("--quiet") == 2
    assert "is a file; choose another folder" in capsys.readouterr().err


def test_an_interruption_ends_with_status_130(generate, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mtl_anagram.generate.sample_stage1", interrupt)
    assert generate("--quiet") == 130
    shown = capsys.readouterr()
    assert "the same command goes on from there" in shown.err
    assert shown.out == ""
    monkeypatch.undo()
    assert generate("--quiet") == 0


def test_a_cascade_without_stage_2_says_so(generate, cascade_folder, capsys):
    options = ["--noise-clip", str(cascade_folder / "noise_clip"), "--quiet"]
    assert generate(*options, model=cascade_folder / "stage_1") == 0
    assert "has no stage II: stopped after stage I" in capsys.readouterr().err
    assert generate(*options, "--stop-after", "64", model=cascade_folder / "stage_1") == 2
    assert "no stage II" in capsys.readouterr().err
    assert generate("--quiet", out="b") == 0
    assert capsys.readouterr().err == ""


def test_what_the_cascade_has_not_learnt_is_one_line(generate, cascade_folder, tmp_path, capsys):
    own = shutil.copytree(cascade_folder, tmp_path / "own")
    (own / "cascade.json").write_text(json.dumps({"name": "own", "concepts": ["duck", "cat"]}))
    assert generate("--quiet", model=own) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mtl-anagram: 'a rabbit': own has not learnt to draw that")
    assert "duck, cat" in line


def test_a_cascade_without_a_noise_aware_clip(generate, cascade_folder, capsys):
    assert generate("--quiet", model=cascade_folder / "stage_1") == 2
    assert "noise_clip=" in capsys.readouterr().err
    assert generate("--quiet", "--no-balancing", model=cascade_folder / "stage_1") == 0


def test_repeat(generate, cascade_folder, tmp_path, capsys):
    assert generate("--quiet", "--seed", "4") == 0
    capsys.readouterr()
    path = tmp_path / "out" / "0004" / "metadata.json"
    options = ["--model", str(cascade_folder), "--device", "cpu", "--out", str(tmp_path / "again")]
    assert main(["repeat", str(path), *options]) == 0
    shown = capsys.readouterr()
    again = tmp_path / "again" / "0004" / "sample_16.png"
    assert shown.out.split("  ")[0] == str(again)
    assert "stage I, seed 4" in shown.err
    assert again.read_bytes() == path.with_name("sample_16.png").read_bytes()
    assert main(["repeat", str(path), *options, "--quiet"]) == 0
    shown = capsys.readouterr()
    assert "(was there)" in shown.out
    assert shown.err == ""
    assert main(["repeat", str(path), *options, "--quiet", "--overwrite"]) == 0
    assert "(was there)" not in capsys.readouterr().out
    assert main(["repeat", str(tmp_path / "none.json"), *options]) == 2
    assert "none.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, status",
    [(["--version"], 0), (["--help"], 0), (["generate", "--help"], 0), (["repeat", "-h"], 0)],
)
def test_information(arguments, status, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == status
    shown = capsys.readouterr()
    assert shown.err == ""
    if arguments == ["--version"]:
        assert shown.out == f"mtl-anagram {mtl_anagram.__version__}\n"
    if arguments == ["--help"]:
        assert "generate" in shown.out
        assert "repeat" in shown.out
    if arguments[0] == "generate":
        for option in ("--views", "--recipe", "--no-balancing", "--no-anti-segregation", "--stop-after"):
            assert option in shown.out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["generate"],
        ["generate", "a duck"],
        ["generate", "a duck", "--views", "identity", "--recipe", "best"],
        ["generate", "a duck", "--views", "identity", "--steps", "many"],
        ["repeat"],
    ],
)
def test_arguments_that_do_not_parse(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: mtl-anagram" in capsys.readouterr().err


def test_every_path_is_reported(cascade_folder, monkeypatch, capsys):
    folder = Path("out") / "0007"
    whole = Anagram(7, folder, {64: folder / "sample_64.png", 256: folder / "sample_256.png"}, skipped=True)
    monkeypatch.setattr("mtl_anagram.generate.generate_anagram", lambda *args, **options: [whole])
    assert main(["generate", *READINGS, "--model", str(cascade_folder), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{folder / f'sample_{side}.png'}  sample_{side}.views.png  (was there)" for side in (64, 256)
    ]


def test_as_a_process(cascade_folder, tmp_path):
    command = [sys.executable, "-m", "mtl_anagram.cli", "generate", *READINGS]
    command += ["--model", str(cascade_folder), "--size", "16", "--stop-after", "16", "--steps", "2"]
    command += ["--device", "cpu", "--out", "pictures", "--seed", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / done.stdout.split("  ")[0]).is_file()
    assert "2/2" in done.stderr
