"""The protocol: cells are sampled once, as generate_anagram samples, and the report's figures are counted by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from mtl_anagram import Cascade, Protocol, Recipe, evaluate, evaluation, generate_anagram
from mtl_anagram.cli import main
from mtl_anagram.errors import InputError
from mtl_anagram.evaluation import ABLATION, choose_pairs
from mtl_anagram.media import decode_png
from mtl_anagram.metrics import alignment, concealment
from mtl_anagram.models import Judge
from mtl_anagram.report import as_table, interval, report
from tests.unit.tiny import write_cascade

QUICK = Recipe.plain(num_inference_steps=2)
PROTOCOL = Protocol(
    pairs=(("duck", "rabbit"), ("cat", "house")), views=("flip", "rotate_180"), seeds=(3, 4),
    recipes={"plain": QUICK, "balancing": Recipe.plain(num_inference_steps=2, balancing=True)},
)  # fmt: skip


@pytest.fixture(scope="module")
def judge() -> Judge:
    torch.manual_seed(0)
    return Judge(["duck", "rabbit", "cat", "house"], widths=(8, 8, 8, 8)).eval()


def test_cells_are_made_once_and_go_on(cascade, judge, one_thread, tmp_path) -> None:
    first = evaluate(cascade, PROTOCOL, tmp_path, judge=judge)
    files = sorted((tmp_path / "cells").glob("*.json"))
    assert len(files) == 2 * 2 * 2
    assert json.loads((tmp_path / "report.json").read_text()) == first
    times = {path: path.stat().st_mtime_ns for path in files}
    files[0].unlink()
    again = evaluate(cascade, PROTOCOL, tmp_path, judge=judge, batch_size=1)
    assert [path for path in files if path.stat().st_mtime_ns != times[path]] == [files[0]]
    assert [row["all_named"] for row in again["rows"]] == [row["all_named"] for row in first["rows"]]
    assert {(row["view"], row["recipe"]) for row in first["rows"]} == {
        (view, recipe) for view in ("all", "flip", "rotate_180") for recipe in PROTOCOL.recipes
    }
    table = as_table(first)
    assert table.count("\n") == 7
    assert "| rotate_180 | balancing | 4 |" in table


def test_cells_of_64_px_outlive_another_stage_2(judge, one_thread, tmp_path) -> None:
    folder = write_cascade(tmp_path / "cascade")
    protocol = dataclasses.replace(PROTOCOL, pairs=(("duck", "cat"),), views=("flip",))

    def cells(size: int = 64) -> int:
        model = Cascade.from_pretrained(folder, device="cpu")
        evaluate(model, dataclasses.replace(protocol, size=size), tmp_path / "out", judge=judge)
        return len(list((tmp_path / "out/cells").glob("*.json")))

    assert (cells(), cells(256)) == (2, 4)
    config = folder / "stage_2/unet/config.json"
    config.write_text(config.read_text() + "\n")
    assert (cells(), cells(256)) == (4, 6)


def test_another_judge_or_clip_measures_anew_and_samples_what_it_must(
    judge, one_thread, tmp_path, monkeypatch
) -> None:
    folder = write_cascade(tmp_path / "cascade")
    protocol = dataclasses.replace(PROTOCOL, pairs=(("duck", "cat"),), views=("flip",))
    cells = tmp_path / "out/cells"

    def go(judge: Judge, **changes: float) -> tuple[dict[str, int], int]:
        """How often each recipe was sampled in this call, and how many measurements there are after it."""
        sampled = {"plain": 0, "balancing": 0}
        real = evaluation._sampled

        def counted(parts, protocol, recipe, *rest):
            sampled["balancing" if recipe.balancing else "plain"] += 1
            return real(parts, protocol, recipe, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "_sampled", counted)
            model = Cascade.from_pretrained(folder, device="cpu")
            evaluate(model, dataclasses.replace(protocol, **changes), tmp_path / "out", judge=judge)
        return sampled, len(list(cells.glob("*.json")))

    assert go(judge) == ({"plain": 1, "balancing": 1}, 2)
    first = {p.name: json.loads(p.read_text()) for p in cells.glob("*.json")}
    assert go(judge, temperature=0.1) == ({"plain": 0, "balancing": 0}, 4)
    torch.manual_seed(1)
    other = Judge(judge.names, widths=(8, 8, 8, 8)).eval()
    assert go(other) == ({"plain": 0, "balancing": 0}, 6)
    merges = folder / "noise_clip/merges.txt"
    merges.write_bytes(merges.read_bytes() + b"\n")  # another file, the same CLIP
    assert go(judge) == ({"plain": 0, "balancing": 1}, 8)  # balancing alone is steered by the CLIP
    for name in first:  # measured from the file, a picture gives the same figures again
        (cells / name).unlink()
    merges.write_bytes(merges.read_bytes()[:-1])
    assert go(judge) == ({"plain": 0, "balancing": 0}, 8)
    assert {name: json.loads((cells / name).read_text()) for name in first} == first


def test_a_cell_is_what_generate_makes(cascade, judge, one_thread, tmp_path) -> None:
    evaluate(cascade, PROTOCOL, tmp_path / "evaluation", judge=judge)
    made = generate_anagram(
        "a sketch of", ["a duck", "a rabbit"], ["identity", "flip"], tmp_path / "made", seed=4, model=cascade,
        recipe=PROTOCOL.recipes["balancing"], stop_after=64,
    )  # fmt: skip
    (strip,) = (tmp_path / "evaluation/cells").glob("balancing-flip-duck-rabbit-*.png")
    picture = decode_png(made[0].pictures[64].read_bytes())
    other = decode_png(strip.read_bytes())[:, :, 64:]  # the second seed
    assert (picture - other).abs().max() < 2.1 * 2 / 255
    (file,) = (tmp_path / "evaluation/cells").glob("balancing-flip-duck-rabbit-*.json")
    cell = json.loads(file.read_text())
    assert cell["picture"] == strip.name
    seen = torch.stack([picture, picture.flip(1)])
    with torch.no_grad():
        names = [judge.names[k] for k in judge(seen).argmax(1).tolist()]
        images = cascade.noise_clip.embed_image(seen, 0)
        texts = cascade.noise_clip.embed_text(["a sketch of a duck", "a sketch of a rabbit"])
    assert cell["samples"][1]["named"] == names
    assert torch.allclose(torch.tensor(cell["samples"][1]["scores"]), images @ texts.T, atol=0.01)


def test_single_readings_need_no_view(cascade, judge, one_thread, tmp_path) -> None:
    protocol = Protocol(pairs=(("duck",), ("cat",)), recipes={"plain": QUICK}, seeds=(0,))
    summary = evaluate(cascade, protocol, tmp_path, judge=judge)
    (row,) = summary["rows"]
    assert (row["readings"], row["samples"], row["pairs"]) == (1, 2, 2)
    assert "| one reading | plain | 2 |" in as_table(summary)


def test_stage_2_is_measured_where_asked(cascade, judge, one_thread, tmp_path) -> None:
    protocol = Protocol(
        pairs=(("duck", "cat"),), views=("flip",), recipes={"plain": QUICK}, seeds=(0,), size=256
    )
    evaluate(cascade, protocol, tmp_path, judge=judge)
    (strip,) = (tmp_path / "cells").glob("*.png")
    assert decode_png(strip.read_bytes()).shape == (3, 256, 256)


def cell(
    recipe: str, names: list[str], named: list[list[str]], scores: list[float], view: str = "flip"
) -> dict:
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
    assert plain["all_named"]["value"] == pytest.approx(1 / 6, abs=1e-4)
    assert own["all_named"]["value"] == pytest.approx(3 / 6, abs=1e-4)
    assert (plain["best_of_n"]["value"], own["best_of_n"]["value"]) == (0, 0.5)  # by the CLIP's choice
    assert (plain["any_of_n"]["value"], own["any_of_n"]["value"]) == (0.5, 1)
    assert own["best_of_n_over_plain"]["value"] == 0.5
    assert (own["best_of_n_over_plain"]["low"], own["best_of_n_over_plain"]["high"]) == (0, 1)
    assert own["A"]["value"] == pytest.approx((0.9 + 0.1 + 0.2 + 0.1 + 0.4 + 0.3) / 6, abs=1e-4)
    assert (own["A"]["low"], own["A"]["high"]) == (0.2667, 0.4)  # one pair twice, or the other
    assert own["A.9"]["value"] == pytest.approx(0.65)  # between 0.4 and 0.9
    assert own["A_over_plain"]["value"] == pytest.approx(0.2 / 6, abs=1e-4)
    assert own["A_over_plain"] | {"value": 0} == {"value": 0, "low": 0.0, "high": 0.0667}


def test_a_pair_is_compared_with_itself_and_drawn_with_all_its_views() -> None:
    """Whatever the files' order: the second pair is read under plain alone, the first under own alone."""
    names, wrong = [["a", "b"], ["c", "d"]], ["x", "x"]

    def cells(recipe: str, read: list[str], order: int, seeds: int = 2) -> list[dict]:
        return [
            cell(recipe, pair, [pair if pair == read else wrong] * seeds, [0.1] * seeds, view)
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
    for base in (cells("plain", names[1], 1, seeds=3), cells("plain", names[1], 1)[:2]):
        rows = report([*cells("own", names[0], 1), *base], 0.05)["rows"]
        (own,) = (row for row in rows if (row["view"], row["recipe"]) == ("all", "own"))
        assert "all_named_over_plain" not in own  # other seeds, and pairs that plain lacks


def test_the_interval_covers_as_often_as_it_says() -> None:
    """A share of 0.3 from 40 pairs: in 200 repetitions about 95% of the intervals hold it."""
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        found = interval((torch.rand(40, generator=generator) < 0.3).float())
        hits += found["low"] <= 0.3 <= found["high"]
    assert 175 <= hits <= 199


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
        ({"pairs": ()}, "pairs="),
        ({"pairs": (("a", "b", "c"),)}, "one or two"),
        ({"recipes": {}}, "at least one"),
        ({"recipes": {"x": 3}}, "Recipe"),
        ({"seeds": (-1,)}, "seed=-1"),
        ({"views": ("turn",)}, "turn"),
    ],
)
def test_a_protocol_that_cannot_be_is_refused(changes, words) -> None:
    with pytest.raises(InputError, match=words):
        Protocol(**{"pairs": (("duck", "cat"),), **changes})


def test_names_unknown_to_the_judge_are_refused_before_sampling(cascade, judge, tmp_path) -> None:
    protocol = Protocol(pairs=(("duck", "walrus"),), recipes={"plain": QUICK})
    with pytest.raises(InputError, match="walrus"):
        evaluate(cascade, protocol, tmp_path, judge=judge)
    assert not list(tmp_path.iterdir())


def test_the_ablation_has_each_technique_alone() -> None:
    switches = {name: (r.balancing, r.rectification, r.anti_segregation) for name, r in ABLATION.items()}
    assert switches["plain"] == (False, False, False)
    assert sorted(switches[n] for n in ("balancing", "rectification", "anti_segregation")) == [
        (False, False, True), (False, True, False), (True, False, False),
    ]  # fmt: skip
    assert switches["released"] == switches["corrected"] == (True, True, True)


def test_the_command_prints_a_table(cascade_folder, one_thread, tmp_path, capsys) -> None:
    words = [
        "evaluate",
        "--model",
        str(cascade_folder),
        "--pairs",
        "duck/rabbit",
        "--views",
        "flip",
        "--seed",
        "0",
    ]
    words += ["--recipes", "plain", "--steps", "2", "--out", str(tmp_path), "--quiet", "--device", "cpu"]
    assert main(words) == 0
    assert "| flip | plain | 1 |" in capsys.readouterr().out
    assert main([*words, "--recipes", "best"]) == 2
    assert "plain, balancing" in capsys.readouterr().err
    assert main([*words, "--pairs", "duck/rabbit/cat"]) == 2
    own = tmp_path / "mine.json"
    own.write_text(json.dumps(Recipe.plain(num_inference_steps=1, guidance_scale=2).to_dict()))
    capsys.readouterr()
    assert main([*words, "--recipes", "plain", str(own)]) == 0
    assert "| flip | mine | 1 |" in capsys.readouterr().out


def test_measures_agree_with_their_definitions() -> None:
    scores = torch.tensor([[[0.5, 0.2], [0.1, 0.3]]])
    assert alignment(scores).item() == pytest.approx(0.3)
    rows, columns = (scores / 0.05).softmax(2), (scores / 0.05).softmax(1)
    expected = (rows[0, 0, 0] + rows[0, 1, 1] + columns[0, 0, 0] + columns[0, 1, 1]) / 4
    assert concealment(scores, 0.05).item() == pytest.approx(expected.item())
