"""The best of N: the scores decide, candidates stay, and the winner is the picture its seed makes."""

import json

import pytest
import torch

from mtl_anagram import Recipe, generate_anagram, repeat_anagram
from mtl_anagram.errors import InputError, PromptWarning
from mtl_anagram.evaluation.best_of import best_of, embed_finished
from mtl_anagram.evaluation.gallery import find_made
from mtl_anagram.evaluation.metrics import anagram_score
from mtl_anagram.files.images import read_picture
from tests.unit.tiny_requests import on_cpu

PROMPTS, VIEWS = ["a duck", "a [rabbit]"], ["identity", "rotate_180"]
QUICK = Recipe.plain(num_inference_steps=1)


def cosines(clip, candidate, names):
    """What the views of a candidate's picture have in common with sketches of these: (1, V, N)."""
    picture = read_picture(candidate.anagram.pictures[64])
    seen = torch.stack([picture, picture.rot90(2, (1, 2))])
    return (embed_finished(clip, seen) @ clip.embed_text([f"a sketch of a {name}" for name in names]).T)[None]


def test_the_highest_score_goes_through_all_stages(cascade, tmp_path) -> None:
    request, rows = {"seed": 5, "model": cascade, "recipe": QUICK}, []
    with cascade.unet_1.register_forward_hook(lambda unet, given, output: rows.append(len(given[0]))):
        best, candidates = best_of(3, "a sketch of", PROMPTS, VIEWS, tmp_path, **request)
    assert sum(rows) == 3 * 1 * 2 * 2  # stage I once: candidates, step, views, with and without text
    scores = {c.anagram.seed: c.score for c in candidates}
    assert sorted(scores) == [5, 6, 7]
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert best.seed == candidates[0].anagram.seed
    shown = find_made([tmp_path])  # the best one's candidate is the same picture
    assert [(made.content["seed"], made.score) for made in shown] == list(scores.items())
    assert sorted(best.pictures) == [64, 256]
    small = read_picture(tmp_path / f"{best.seed:04d}/sample_64.png")
    other = read_picture(candidates[0].anagram.pictures[64])
    assert (small - other).abs().max() < 2.1 * 2 / 255
    wanted = anagram_score(cosines(cascade.noise_clip, candidates[0], ["duck", "rabbit"])).item()
    assert candidates[0].score == pytest.approx(wanted, abs=1e-5)
    again, same = best_of(3, "a sketch of", PROMPTS, VIEWS, tmp_path, **request)
    assert again.skipped
    assert all(c.anagram.skipped for c in same)
    alone = generate_anagram("a sketch of", PROMPTS, VIEWS, tmp_path / "a", **request | {"seed": best.seed})
    assert alone[0].pictures[256].read_bytes() == best.pictures[256].read_bytes()


def test_candidates_of_a_start_can_be_made_again(cascade, tmp_path) -> None:
    request = {"start_from": torch.rand(3, 256, 256) * 2 - 1, "strength": [1, 0.5], "model": cascade}
    _, (one, _) = best_of(2, "a sketch of", PROMPTS, VIEWS, tmp_path / "a", recipe=QUICK, **request)
    again = repeat_anagram(one.anagram.folder, tmp_path / "b", model=cascade)
    assert again.pictures[64].read_bytes() == one.anagram.pictures[64].read_bytes()
    assert len(find_made([tmp_path / "a" / "candidates"])) == 2  # the best one is above, and not asked for


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
        best_of(2, "", PROMPTS, VIEWS, tmp_path, model=on_cpu(cascade_folder / "stage_1"))
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::mtl_anagram.PromptWarning")  # of the first call
def test_what_the_cascade_has_learnt_stands_against_the_readings(own_folder, tmp_path) -> None:
    index = own_folder / "cascade.json"
    index.write_text(json.dumps({"name": "tiny", "concepts": ["duck", "cat", "house"]}))
    model = on_cpu(own_folder, stage_2="none")
    _, (only,) = best_of(1, "a sketch of", PROMPTS, VIEWS, tmp_path / "out", model=model, recipe=QUICK)
    names = ["duck", "rabbit", "cat", "house"]
    log_p = (cosines(model.noise_clip, only, names)[0] / 0.05).log_softmax(1)
    assert only.score == pytest.approx(min(log_p[0, 0], log_p[1, 1]).item(), abs=1e-4)
    about = {"name": "tiny", "concepts": ["duck"], "clip_concepts": ["duck", "cat", "house"]}
    index.write_text(json.dumps(about))
    wider = on_cpu(own_folder, stage_2="none")
    assert wider.clip_concepts == model.clip_concepts == model.concepts
    with pytest.warns(PromptWarning, match="'a sketch of a rabbit': tiny has not learnt") as seen:
        _, (same,) = best_of(1, "a sketch of", PROMPTS, VIEWS, tmp_path / "2", model=wider, recipe=QUICK)
    assert same.score == only.score
    assert len([w for w in seen if w.category is PromptWarning]) == 1
