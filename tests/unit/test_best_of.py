"""The best of N: the scores decide, candidates stay, and the winner is the picture its seed makes."""

from __future__ import annotations

import json

import pytest
import torch

from mtl_anagram import Cascade, Recipe, generate_anagram
from mtl_anagram.best_of import best_of
from mtl_anagram.cli import main
from mtl_anagram.errors import ConfigError, InputError, PromptWarning
from mtl_anagram.media import decode_png
from mtl_anagram.metrics import anagram_score
from tests.unit.tiny import write_cascade

PROMPTS, VIEWS = ["a duck", "a [rabbit]"], ["identity", "rotate_180"]
QUICK = Recipe.plain(num_inference_steps=2)


def test_the_highest_score_goes_through_all_stages(cascade, one_thread, tmp_path) -> None:
    best, candidates = best_of(
        3, "a sketch of", PROMPTS, VIEWS, tmp_path, seed=5, model=cascade, recipe=QUICK
    )
    assert sorted(c.anagram.seed for c in candidates) == [5, 6, 7]
    assert [c.score for c in candidates] == sorted((c.score for c in candidates), reverse=True)
    assert best.seed == candidates[0].anagram.seed
    assert sorted(best.pictures) == [64, 256]
    small = decode_png((tmp_path / f"{best.seed:04d}/sample_64.png").read_bytes())
    other = decode_png(candidates[0].anagram.pictures[64].read_bytes())
    assert (small - other).abs().max() < 2.1 * 2 / 255
    clip = cascade.noise_clip
    seen = torch.stack([other, other.rot90(2, (1, 2))])
    texts = clip.embed_text(["a sketch of a duck", "a sketch of a rabbit"])
    assert candidates[0].score == pytest.approx(
        anagram_score((clip.embed_finished(seen) @ texts.T)[None]).item(), abs=1e-5
    )
    again, same = best_of(3, "a sketch of", PROMPTS, VIEWS, tmp_path, seed=5, model=cascade, recipe=QUICK)
    assert again.skipped
    assert all(c.anagram.skipped for c in same)
    alone = generate_anagram(
        "a sketch of", PROMPTS, VIEWS, tmp_path / "alone", seed=best.seed, model=cascade, recipe=QUICK
    )
    assert alone[0].pictures[256].read_bytes() == best.pictures[256].read_bytes()


def test_the_score_wants_every_reading_in_its_own_view_alone() -> None:
    good = [[0.5, 0.1], [0.1, 0.5]]
    one_missing = [[0.5, 0.1], [0.1, 0.2]]
    both_in_both = [[0.5, 0.5], [0.5, 0.5]]
    scores = anagram_score(torch.tensor([good, one_missing, both_in_both]))
    assert scores[0] > scores[1]
    assert scores[0] > scores[2]


def test_bad_requests_are_refused(cascade, tmp_path) -> None:
    with pytest.raises(InputError, match="count=0"):
        best_of(0, "", PROMPTS, VIEWS, tmp_path, model=cascade)
    with pytest.raises(InputError, match="two readings"):
        best_of(2, "", PROMPTS[:1], VIEWS[:1], tmp_path, model=cascade)
    with pytest.raises(InputError, match="seed="):
        best_of(2, "", PROMPTS, VIEWS, tmp_path, seed=2**63 - 1, model=cascade)
    folder = write_cascade(tmp_path / "cascade", stage_2=False)
    for file in (folder / "noise_clip").iterdir():
        file.unlink()
    (folder / "noise_clip").rmdir()
    with pytest.raises(InputError, match="noise_clip="):
        best_of(2, "", PROMPTS, VIEWS, tmp_path / "out", model=Cascade.from_pretrained(folder, device="cpu"))
    assert not (tmp_path / "out").exists()


def test_the_command_shows_the_scores(cascade_folder, one_thread, tmp_path, capsys) -> None:
    words = ["generate", *PROMPTS, "--views", *VIEWS, "--best-of", "2", "--steps", "2", "--recipe", "plain"]
    words += ["--model", str(cascade_folder), "--device", "cpu", "--out", str(tmp_path), "--quiet"]
    assert main([*words, "--stop-after", "64"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len([line for line in printed if line.startswith("seed ") and "score" in line]) == 2
    assert printed[-1].startswith(str(tmp_path / "000"))
    assert main([*words, "--seed", "1-2"]) == 2
    assert "one --seed" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::mtl_anagram.PromptWarning")  # of the first two calls
def test_what_the_cascade_has_learnt_stands_against_the_readings(one_thread, tmp_path) -> None:
    folder = write_cascade(tmp_path / "cascade", stage_2=False)
    index = folder / "cascade.json"
    about = json.loads(index.read_text()) if index.is_file() else {}
    index.write_text(json.dumps({**about, "concepts": ["duck", "cat", "house"]}))
    model = Cascade.from_pretrained(folder, device="cpu")
    assert model.concepts == ("duck", "cat", "house")
    _, candidates = best_of(1, "a sketch of", PROMPTS, VIEWS, tmp_path / "out", model=model, recipe=QUICK)
    clip = model.noise_clip
    picture = decode_png(candidates[0].anagram.pictures[64].read_bytes())
    seen = torch.stack([picture, picture.rot90(2, (1, 2))])
    words = ["a duck", "a rabbit", "a cat", "a house"]
    cosines = clip.embed_finished(seen) @ clip.embed_text([f"a sketch of {word}" for word in words]).T
    log_p = (cosines / 0.05).log_softmax(1)
    assert candidates[0].score == pytest.approx(min(log_p[0, 0], log_p[1, 1]).item(), abs=1e-4)
    index.write_text(json.dumps({**about, "concepts": ["duck"], "clip_concepts": ["duck", "cat", "house"]}))
    wider = Cascade.from_pretrained(folder, device="cpu")
    assert wider.concepts == ("duck",)
    assert wider.clip_concepts == model.clip_concepts == model.concepts
    _, same = best_of(1, "a sketch of", PROMPTS, VIEWS, tmp_path / "out2", model=wider, recipe=QUICK)
    assert same[0].score == candidates[0].score
    with pytest.warns(PromptWarning, match="'a sketch of a rabbit': tiny has not learnt") as seen:
        best_of(1, "a sketch of", PROMPTS, VIEWS, tmp_path / "out2", model=wider, recipe=QUICK)
    assert len([w for w in seen if w.category is PromptWarning]) == 1
    index.write_text(json.dumps({**about, "clip_concepts": 7}))
    with pytest.raises(ConfigError, match="clip_concepts=7"):
        Cascade.from_pretrained(folder)
    index.write_text(json.dumps({**about, "concepts": "duck"}))
    with pytest.raises(ConfigError, match="concepts='duck'"):
        Cascade.from_pretrained(folder)
