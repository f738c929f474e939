"""The best of N: the scores decide, candidates stay, and the winner is the picture its seed makes."""

from __future__ import annotations

import json

import pytest
import torch

from mtl_anagram import Cascade, Recipe, generate_anagram
from mtl_anagram.__main__ import main
from mtl_anagram.errors import InputError, PromptWarning
from mtl_anagram.evaluation.best_of import best_of, embed_finished
from mtl_anagram.evaluation.gallery import find_made
from mtl_anagram.evaluation.metrics import anagram_score
from mtl_anagram.files.images import read_picture

PROMPTS, VIEWS = ["a duck", "a [rabbit]"], ["identity", "rotate_180"]
QUICK = Recipe.plain(num_inference_steps=1)


def test_the_highest_score_goes_through_all_stages(cascade, tmp_path) -> None:
    request, rows = {"seed": 5, "model": cascade, "recipe": QUICK}, []
    with cascade.unet_1.register_forward_hook(lambda unet, given, output: rows.append(len(given[0]))):
        best, candidates = best_of(3, "a sketch of", PROMPTS, VIEWS, tmp_path, **request)
    assert sum(rows) == 3 * 1 * 2 * 2  # stage I once: candidates, step, views, with and without text
    assert sorted(c.anagram.seed for c in candidates) == [5, 6, 7]
    assert [c.score for c in candidates] == sorted((c.score for c in candidates), reverse=True)
    assert best.seed == candidates[0].anagram.seed
    shown = find_made([tmp_path])  # the best one's candidate is the same picture
    assert [(made.content["seed"], made.score) for made in shown] == [
        (c.anagram.seed, c.score) for c in candidates
    ]
    assert sorted(best.pictures) == [64, 256]
    small = read_picture(tmp_path / f"{best.seed:04d}/sample_64.png")
    other = read_picture(candidates[0].anagram.pictures[64])
    assert (small - other).abs().max() < 2.1 * 2 / 255
    clip = cascade.noise_clip
    seen = torch.stack([other, other.rot90(2, (1, 2))])
    texts = clip.embed_text(["a sketch of a duck", "a sketch of a rabbit"])
    assert candidates[0].score == pytest.approx(
        anagram_score((embed_finished(clip, seen) @ texts.T)[None]).item(), abs=1e-5
    )
    again, same = best_of(3, "a sketch of", PROMPTS, VIEWS, tmp_path, **request)
    assert again.skipped
    assert all(c.anagram.skipped for c in same)
    alone = generate_anagram(
        "a sketch of", PROMPTS, VIEWS, tmp_path / "alone", seed=best.seed, model=cascade, recipe=QUICK
    )
    assert alone[0].pictures[256].read_bytes() == best.pictures[256].read_bytes()


def test_finished_pictures_are_looked_at_more_than_once(cascade) -> None:
    """A unit vector, the same alone as in a batch, which a mirror moves less than it moves a single look's."""
    clip = cascade.noise_clip
    pictures = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = embed_finished(clip, pictures)
    assert torch.allclose(found.norm(dim=-1), torch.ones(5), atol=1e-5)
    assert torch.equal(embed_finished(clip, pictures), found)
    assert torch.allclose(embed_finished(clip, pictures[2:3]), found[2:3], atol=1e-5)

    def moved(embed) -> float:  # next to how far two pictures lie apart
        own = embed(pictures)
        return ((embed(pictures.flip(-1)) - own).norm(dim=-1) / torch.pdist(own).mean()).mean().item()

    assert moved(lambda x: embed_finished(clip, x)) < 0.8 * moved(lambda x: clip.embed_image(x, 0))


def test_bad_requests_are_refused(cascade, cascade_folder, tmp_path) -> None:
    with pytest.raises(InputError, match="count=0"):
        best_of(0, "", PROMPTS, VIEWS, tmp_path, model=cascade)
    with pytest.raises(InputError, match="two readings"):
        best_of(2, "", PROMPTS[:1], VIEWS[:1], tmp_path, model=cascade)
    with pytest.raises(InputError, match="views=None"):
        best_of(2, "", PROMPTS, None, tmp_path, model=cascade)
    with pytest.raises(InputError, match="seed="):
        best_of(2, "", PROMPTS, VIEWS, tmp_path, seed=2**63 - 1, model=cascade)
    with pytest.raises(InputError, match="noise_clip="):
        best_of(2, "", PROMPTS, VIEWS, tmp_path, model=Cascade.from_pretrained(cascade_folder / "stage_1"))
    assert not list(tmp_path.iterdir())


def test_the_command_shows_the_scores(cascade_folder, tmp_path, capsys) -> None:
    words = ["generate", *PROMPTS, "--views", *VIEWS, "--best-of", "2", "--steps", "1", "--device", "cpu"]
    words += ["--model", str(cascade_folder), "--out", str(tmp_path), "--quiet", "--stop-after", "64"]
    assert main(words) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len([line for line in printed if line.startswith("seed ") and "score" in line]) == 2
    assert printed[-1].startswith(str(tmp_path / "000"))


@pytest.mark.filterwarnings("ignore::mtl_anagram.PromptWarning")  # of the first call
def test_what_the_cascade_has_learnt_stands_against_the_readings(own_folder, tmp_path) -> None:
    index = own_folder / "cascade.json"
    index.write_text(json.dumps({"name": "tiny", "concepts": ["duck", "cat", "house"]}))
    model = Cascade.from_pretrained(own_folder, stage_2="none", device="cpu")
    _, candidates = best_of(1, "a sketch of", PROMPTS, VIEWS, tmp_path / "out", model=model, recipe=QUICK)
    clip = model.noise_clip
    picture = read_picture(candidates[0].anagram.pictures[64])
    seen = torch.stack([picture, picture.rot90(2, (1, 2))])
    words = ["a duck", "a rabbit", "a cat", "a house"]
    cosines = embed_finished(clip, seen) @ clip.embed_text([f"a sketch of {word}" for word in words]).T
    log_p = (cosines / 0.05).log_softmax(1)
    assert candidates[0].score == pytest.approx(min(log_p[0, 0], log_p[1, 1]).item(), abs=1e-4)
    index.write_text(
        json.dumps({"name": "tiny", "concepts": ["duck"], "clip_concepts": ["duck", "cat", "house"]})
    )
    wider = Cascade.from_pretrained(own_folder, stage_2="none", device="cpu")
    assert wider.clip_concepts == model.clip_concepts == model.concepts
    with pytest.warns(PromptWarning, match="'a sketch of a rabbit': tiny has not learnt") as seen:
        _, same = best_of(1, "a sketch of", PROMPTS, VIEWS, tmp_path / "2", model=wider, recipe=QUICK)
    assert same[0].score == candidates[0].score
    assert len([w for w in seen if w.category is PromptWarning]) == 1
