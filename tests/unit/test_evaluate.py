"""The protocol: cells are sampled once, as generate_anagram samples, and the report's figures are counted by hand."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mtl_anagram import Cascade, Protocol, Recipe, evaluate, generate_anagram
from mtl_anagram.__main__ import main
from mtl_anagram.errors import InputError
from mtl_anagram.evaluation.partners import measure_partners, partners_of
from mtl_anagram.evaluation.protocol import as_table, choose_pairs, interval, report
from mtl_anagram.files.images import read_picture
from mtl_anagram.models import Judge
from mtl_anagram.sampling import Combined
from tests.readme import ROOT, write_glide
from tests.unit.processes import on_tiny, start, status

QUICK = Recipe.plain(num_inference_steps=1)
PROTOCOL = Protocol(
    pairs=(("duck", "rabbit"), ("cat", "house")), views=("flip", "rotate_180"), seeds=(3, 4),
    recipes={"plain": QUICK, "balancing": Recipe.plain(num_inference_steps=1, balancing=True)},
)  # fmt: skip


@pytest.fixture(scope="module")
def judge() -> Judge:
    torch.manual_seed(0)
    return Judge(["duck", "rabbit", "cat", "house"], widths=(8, 8, 8, 8)).eval()


def test_cells_are_made_once_and_go_on(cascade, judge, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    first = evaluate(cascade, PROTOCOL, f"~/{tmp_path.name}", judge=judge)
    files = sorted((tmp_path / "cells").glob("*.json"))
    assert len(files) == 2 * 2 * 2
    assert json.loads((tmp_path / "report.json").read_text()) == first
    times = {path: path.stat().st_mtime_ns for path in files}
    files[0].unlink()
    picture = tmp_path / "cells" / json.loads(files[1].read_text())["picture"]
    picture.write_bytes(picture.read_bytes()[:99])
    files[1].write_text('{"recipe')
    again = evaluate(cascade, PROTOCOL, tmp_path, judge=judge, batch_size=1)
    assert [path for path in files if path.stat().st_mtime_ns != times[path]] == files[:2]
    assert caplog.text.count("is damaged; it is made again") == 2
    assert [row["all_named"] for row in again["rows"]] == [row["all_named"] for row in first["rows"]]
    assert {(row["view"], row["recipe"]) for row in first["rows"]} == {
        (view, recipe) for view in ("all", "flip", "rotate_180") for recipe in PROTOCOL.recipes
    }
    table = as_table(first)
    assert table.count("\n") == 7
    assert "| rotate_180 | balancing | 4 |" in table


def counted(folder: Path, name: str, judge: Judge, model: Cascade) -> None:
    """Evaluate, and write down how often stage I ran."""
    made: list[int] = []
    model.unet_1.register_forward_pre_hook(lambda module, given: made.append(1))
    found = evaluate(model, PROTOCOL, folder, judge=judge)
    (folder / name).write_text(json.dumps([len(made), found]))


def test_processes_share_the_cells(cascade, cascade_folder, judge, tmp_path) -> None:
    children = [start(on_tiny, counted, cascade_folder, tmp_path, name, judge) for name in ("one", "two")]
    assert [status(child) for child in children] == [0, 0]
    (first, report_1), (second, report_2) = (json.loads((tmp_path / n).read_text()) for n in ("one", "two"))
    assert report_1 == report_2 == evaluate(cascade, PROTOCOL, tmp_path, judge=judge)
    assert first + second == 2 * 2 * 2  # cells of one step each


def test_what_changed_is_made_anew_and_nothing_else(own_folder, judge, tmp_path) -> None:
    cells = tmp_path / "out/cells"
    protocol = dataclasses.replace(PROTOCOL, pairs=(("duck", "cat"),), views=("flip",))

    def go(judge: Judge = judge, **changes: float) -> tuple[int, ...]:
        """How many pictures there are of each recipe after a call, and how many measurements."""
        model = Cascade.from_pretrained(own_folder, device="cpu")
        evaluate(model, dataclasses.replace(protocol, **changes), tmp_path / "out", judge=judge)
        return tuple(len(list(cells.glob(f"{name}*.{end}"))) for name, end in KINDS)

    KINDS = (("plain", "png"), ("balancing", "png"), ("", "json"))
    assert go() == (1, 1, 2)
    first = {p.name: json.loads(p.read_text()) for p in cells.glob("*.json")}
    assert go(temperature=0.1) == (1, 1, 4)
    torch.manual_seed(1)
    assert go(Judge(judge.names, widths=(8, 8, 8, 8)).eval()) == (1, 1, 6)
    merges, config = own_folder / "noise_clip/merges.txt", own_folder / "stage_2/unet/config.json"
    merges.write_bytes(merges.read_bytes() + b"\n")  # another file, the same CLIP
    assert go() == (1, 2, 8)  # balancing alone is steered by the CLIP
    assert go(size=256) == (2, 3, 10)
    assert {read_picture(path).shape[-2] for path in cells.glob("*.png")} == {64, 256}
    config.write_text(config.read_text() + "\n")
    assert (go(), go(size=256)) == ((2, 3, 10), (3, 4, 12))
    for name in first:  # measured from the file, a picture gives the same figures again
        (cells / name).unlink()
    merges.write_bytes(merges.read_bytes()[:-1])
    assert go() == (3, 4, 12)
    assert {name: json.loads((cells / name).read_text()) for name in first} == first


def worst_takes_all(prediction, index, t) -> Combined:
    """A rule of one's own: of two views the one with the larger noise decides alone."""
    power = prediction.noise.square().mean((2, 3, 4))
    weights = torch.nn.functional.one_hot(power.argmax(1), power.shape[1]).to(power)
    noise = (weights[..., None, None, None] * prediction.noise).sum(1)
    return Combined(noise, prediction.variance.mean(1), weights, torch.ones(len(noise)))


def test_a_rule_of_ones_own_is_measured_beside_the_librarys(cascade, judge, tmp_path) -> None:
    recipes = {"plain": QUICK, "worst": (QUICK, {"combine": worst_takes_all})}
    protocol = Protocol(pairs=(("duck", "cat"),), views=("flip",), recipes=recipes, seeds=(0,))
    rows = evaluate(cascade, protocol, tmp_path, judge=judge)["rows"]
    assert [row["recipe"] for row in rows] == ["plain", "worst"]
    assert "A_over_plain" in rows[1]
    (plain,), (worst,) = (list(tmp_path.glob(f"cells/{name}-*.png")) for name in recipes)
    assert plain.read_bytes() != worst.read_bytes()
    run = protocol.run(cascade, "worst", "flip", ("duck", "cat"), 1)
    assert (read_picture(worst) - run.pictures[64][0]).abs().max() < 1.1 / 127.5
    (cell,) = (json.loads(path.read_text()) for path in tmp_path.glob("cells/worst-*.json"))
    assert cell["request"]["rules"] == {"combine": f"{__name__}.worst_takes_all"}


def test_a_cell_is_what_generate_makes(cascade, judge, tmp_path) -> None:
    protocol = dataclasses.replace(PROTOCOL, pairs=(("duck", "rabbit"),), views=("flip",))
    evaluate(cascade, protocol, tmp_path / "evaluation", judge=judge)
    made = generate_anagram(
        "a poster of", ["a duck", "a rabbit"], ["identity", "flip"], tmp_path / "made", seed=4, model=cascade,
        recipe=PROTOCOL.recipes["balancing"], stop_after=64,
    )  # fmt: skip
    (strip,) = (tmp_path / "evaluation/cells").glob("balancing-flip-duck-rabbit-*.png")
    picture = read_picture(made[0].pictures[64])
    other = read_picture(strip)[:, :, 64:]  # the second seed
    assert (picture - other).abs().max() < 2.1 * 2 / 255
    (file,) = (tmp_path / "evaluation/cells").glob("balancing-flip-duck-rabbit-*.json")
    cell = json.loads(file.read_text())
    assert cell["picture"] == strip.name
    seen = torch.stack([picture, picture.flip(1)])
    with torch.no_grad():
        names = [judge.names[k] for k in judge(seen).argmax(1).tolist()]
        images = cascade.noise_clip.embed_image(seen, 0)
        texts = cascade.noise_clip.embed_text(["a poster of a duck", "a poster of a rabbit"])
    assert cell["samples"][1]["named"] == names
    assert torch.allclose(torch.tensor(cell["samples"][1]["scores"]), images @ texts.T, atol=0.01)


def test_single_readings_need_no_view(cascade, judge, tmp_path) -> None:
    protocol = Protocol(pairs=(("duck",), ("cat",)), recipes={"plain": QUICK}, seeds=(0,))
    summary = evaluate(cascade, protocol, tmp_path, judge=judge)
    assert [row["pairs"] for row in summary["rows"]] == [2]
    assert "| one reading | plain | 2 |" in as_table(summary)


def cell(recipe: str, names: list, named: list, scores: list[float], view: str = "flip") -> dict:
    samples = [
        {"seed": i, "scores": [[s, 0.0], [0.0, s]], "score": s, "named": n}
        for i, (s, n) in enumerate(zip(scores, named, strict=True))
    ]
    return {"recipe_name": recipe, "request": {"names": names, "view": view}, "samples": samples}


def test_the_report_counts() -> None:
    right, half = ["a", "b"], ["a", "a"]
    cells = [
        cell("plain", ["a", "b"], [half, half, right], [0.9, 0.1, 0.2]),
        cell("plain", ["b", "a"], [["b", "b"]] * 3, [0.1, 0.2, 0.3]),
        cell("own", ["a", "b"], [right, half, right], [0.9, 0.1, 0.2]),
        cell("own", ["b", "a"], [["b", "a"], ["b", "b"], ["b", "b"]], [0.1, 0.4, 0.3]),
    ]
    plain, own = report(cells, 0.05)["rows"]
    assert (plain["recipe"], plain["pairs"], plain["samples"]) == ("plain", 2, 6)
    assert (plain["all_named"]["value"], own["all_named"]["value"]) == (0.166667, 0.5)
    assert (plain["best_of_n"]["value"], own["best_of_n"]["value"]) == (0, 0.5)  # by the CLIP's choice
    assert (plain["any_of_n"]["value"], own["any_of_n"]["value"]) == (0.5, 1)
    assert own["best_of_n_over_plain"] == {"value": 0.5, "low": 0.0, "high": 1.0}
    assert own["A"] == {"value": 0.333333, "low": 0.266667, "high": 0.4}  # one pair twice, or the other
    assert own["A.9"]["value"] == pytest.approx(0.65)  # between 0.4 and 0.9
    assert own["A_over_plain"] == {"value": 0.033333, "low": 0.0, "high": 0.066667}


def test_a_pair_is_compared_with_itself_and_drawn_with_all_its_views() -> None:
    """Whatever the files' order: the second pair is read under plain alone, the first under own alone."""
    names, wrong = [["a", "b"], ["c", "d"]], ["x", "x"]

    def cells(recipe: str, read: list[str], order: int) -> list[dict]:
        return [
            cell(recipe, pair, [pair if pair == read else wrong] * 2, [0.1] * 2, view)
            for pair in names[::order]
            for view in ("flip", "rotate_180")
        ]

    rows = report([*cells("own", names[0], 1), *cells("plain", names[1], -1)], 0.05)["rows"]
    plain, own = (row for row in rows[::-1] if row["view"] == "all")
    assert (own["pairs"], own["samples"]) == (2, 8)
    difference = {"value": 0.0, "low": -1.0, "high": 1.0}  # +1 and -1
    assert own["all_named_over_plain"] == own["best_of_n_over_plain"] == difference
    assert own["all_named"] == {"value": 0.5, "low": 0.0, "high": 1.0}  # of two pairs, not of four cells
    assert "all_named_over_plain" not in plain


def test_the_interval_covers_as_often_as_it_says() -> None:
    """A share of 0.3 from 40 pairs: in 200 repetitions about 95% of the intervals hold it."""
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        found = interval((torch.rand(40, generator=generator) < 0.3).float())
        hits += found["low"] <= 0.3 <= found["high"]
    assert 175 <= hits <= 199
    assert interval(torch.tensor([[0.0, 1.0, 1.0, 0.0]]))["low"] < 0.5  # of one pair its samples are drawn


def test_pairs_are_drawn_evenly() -> None:
    names = [f"n{i}" for i in range(10)]
    assert len(choose_pairs(names)) == 45
    chosen = choose_pairs(names, 20, seed=1)
    assert chosen == choose_pairs(names, 20, seed=1) != choose_pairs(names, 20, seed=2)
    assert len({frozenset(pair) for pair in chosen}) == 20
    uses = [sum(name in pair for pair in chosen) for name in names]
    assert max(uses) - min(uses) <= 1
    with pytest.raises(InputError, match="two different"):
        choose_pairs(["duck", "duck"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pairs": ()}, "pairs=()"),
        ({"recipes": {"x": (QUICK, {"mix": worst_takes_all})}}, "mix"),
        ({"size": 100}, "100"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"pairs": (("duck", "walrus"),)}, "walrus"),  # the judge does not know it
    ],
)
def test_a_protocol_that_cannot_be_is_refused(cascade, judge, tmp_path, changes, words) -> None:
    with pytest.raises(InputError) as raised:
        evaluate(cascade, Protocol(**{"pairs": (("duck", "cat"),), **changes}), tmp_path, judge=judge)
    assert words in str(raised.value)
    assert not list(tmp_path.iterdir())


QUICKLY = "--pairs duck/rabbit --views flip --seed 0 --recipes plain --steps 1 --quiet --device cpu"


def test_the_command_prints_a_table(cascade_folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", *shlex.split(QUICKLY), "--model", str(cascade_folder)]
    assert main(words) == 0
    assert "| flip | plain | 1 |" in capsys.readouterr().out
    (first,) = (tmp_path / "evaluation").iterdir()
    assert first.name.startswith("duck-rabbit-flip-")
    (tmp_path / "mine.json").write_text(json.dumps({"num_inference_steps": 1, "balancing": False}))
    assert main([*words, "--recipes", "plain", "mine.json"]) == 0
    assert "| flip | mine | 1 |" in capsys.readouterr().out
    assert len(list((tmp_path / "evaluation").iterdir())) == 2  # another protocol, another folder
    assert main([*words, "--recipes", "best"]) == 2
    assert "plain, balancing" in capsys.readouterr().err
    assert main([*words, "--pairs", "duck/rabbit/cat"]) == 2


def test_without_numpy(cascade_folder, tmp_path) -> None:
    """The whole of it, with pickled towers, T5 from its files and a cache, where neither numpy nor sympy (1 s) is."""
    script = "import sys, mtl_anagram.__main__ as m; sys.modules.update(numpy=None, sympy=None); sys.exit(m.main())"
    write_glide(tmp_path / "clip")
    words = ["evaluate", *shlex.split(QUICKLY), "--model", str(cascade_folder), "--judge", "judge"]
    words += shlex.split("--steps 2 --recipes balancing anti_segregation --noise-clip clip --prompt-cache c")
    words += shlex.split("--text-encoder streamed")
    judge = Judge(["duck", "rabbit"])  # as wide as the embedded one: its file says no widths
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge/judge.json").write_text(json.dumps({"names": judge.names}))
    save_file(judge.state_dict(), tmp_path / "judge/judge.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "all read" in done.stdout
    assert "made anew" not in done.stderr  # the second recipe finds its prompts in the cache


def test_partners(cascade_folder, judge, tmp_path) -> None:
    model = Cascade.from_pretrained(cascade_folder, device="cpu")
    model.recipe = QUICK
    names, views = ["duck", "cat", "house"], ("flip", "rotate_ccw")
    rows = measure_partners(model, tmp_path, names=names, views=views, seeds=(0, 1), judge=judge)
    assert {row[:3] for row in rows} == {(*pair, view) for pair in choose_pairs(names) for view in views}
    assert rows == sorted(rows, key=lambda row: (row.read, row.score), reverse=True)
    assert partners_of(tmp_path / "partners.json") == rows
    assert partners_of(tmp_path / "partners.json", "a cat") == [row for row in rows if "cat" in row]
    with pytest.raises(InputError, match="'dog'.*cat, duck, house"):
        partners_of(tmp_path / "partners.json", "dog")
