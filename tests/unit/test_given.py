"""Pictures of one's own, to start from (SDEdit) or with a component that is kept."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from mtl_anagram import InputError, Recipe, SourceError, repeat_anagram
from mtl_anagram.files.images import read_picture, save_picture
from mtl_anagram.sampling import DDIM, Schedule, sample_stage2
from mtl_anagram.views import get_views
from tests.unit.test_sampling_stages import Network, generators, stage1, texts
from tests.unit.tiny_requests import files, metadata, never

PLAIN = Recipe.plain(num_inference_steps=5)
GRAY = torch.full((3, 3), 1 / 3)


def picture(height, width=None, seed=5):
    """Of 8 bits, so that a file of it is as good."""
    drawn = torch.randint(0, 256, (3, height, width or height), generator=torch.Generator().manual_seed(seed))
    return drawn / 127.5 - 1


@pytest.mark.parametrize("shared", [0.0, 0.6])
def test_a_reference_against_the_closed_form(shared):
    """Colours of every pixel ~ N(mean, cov), a linear network: all that is sampled is Gaussian, and known.

    Where brightness and colour are independent (shared = 0), that is the posterior given the reference's brightness.
    """
    steps, mean = 120, torch.tensor([0.1, -0.05, 0.0])
    basis = torch.linalg.qr(torch.tensor([[1.0, 1, 0], [1, -1, 1], [1, 0, -1]]))[0]  # brightness, two colours
    cov = torch.diag(torch.tensor([0.03, 0.02, 0.01]))
    cov[0, 1] = cov[1, 0] = shared * (cov[0, 0] * cov[1, 1]).sqrt()
    cov, known, schedule = basis @ cov @ basis.T, torch.tensor([0.5, 0.2, -0.1]), Schedule.stage_1(steps)

    def gain(t):
        kept, noisy = schedule.roots(int(t))
        return kept, noisy, noisy * torch.linalg.inv(kept**2 * cov + noisy**2 * torch.eye(3))

    def unet(x, t, text):
        kept, _, matrix = gain(t)
        noise = torch.einsum("oc,rchw->rohw", matrix, x - kept * mean[:, None, None])
        return torch.cat([noise, torch.zeros_like(noise)], dim=1)

    found = stage1(
        range(4), views=get_views(["identity"]), text=texts(1), unet=unet, spans=None, step=DDIM(schedule),
        recipe=Recipe.plain(num_inference_steps=steps, guidance_scale=1),
        reference=(known[:, None, None].expand(4, 3, 64, 64), get_views(["grayscale"])[0]),
    )  # fmt: skip
    m, p, rest = torch.zeros(3), torch.eye(3), torch.eye(3) - GRAY
    for state, t, t_next in zip(found, schedule.timesteps, (*schedule.timesteps[1:], -1), strict=True):
        kept, noisy, matrix = gain(t)
        kept_next, noisy_next = schedule.roots(t_next)
        # DDIM's step, which is linear: x -> a x + b.
        a = kept_next / kept * (torch.eye(3) - noisy * matrix) + noisy_next * matrix
        b = (kept_next / kept * noisy - noisy_next) * kept * matrix @ mean
        m = rest @ (a @ m + b) + GRAY @ (kept_next * known)
        p = rest @ a @ p @ a.T @ rest + noisy_next**2 * GRAY
        x = state.x.transpose(0, 1).flatten(1)
        torch.testing.assert_close(x.mean(1), m, rtol=0, atol=0.02)
        torch.testing.assert_close(x.cov(), p, rtol=0.05, atol=0.04 * p.max().item())
    torch.testing.assert_close(GRAY @ x, (GRAY @ known)[:, None].expand_as(x))  # the reference's own
    if not shared:
        torch.testing.assert_close(x.mean(1), rest @ mean + GRAY @ known, rtol=0, atol=0.003)
        torch.testing.assert_close(x.cov(), rest @ cov @ rest, rtol=0.05, atol=0.001)


def test_a_start_is_noised_to_the_level_where_the_steps_begin():
    begun, schedule, unet, seen = picture(64)[None], Schedule.stage_1(5), Network(), []
    given = {"text": texts(1), "views": get_views(["identity"]), "spans": None, "recipe": PLAIN}
    first = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for strength, index in ((1.0, 0), (0.6, 2), (0.01, 4)):
        seen.clear()
        states = stage1(unet=lambda *a: (seen.append(a[0]), unet(*a))[1], start=(begun, strength), **given)
        assert [(s.index, s.timestep) for s in states] == list(enumerate(schedule.timesteps))[index:]
        torch.testing.assert_close(seen[0][:1], schedule.add_noise(begun, first, schedule.timesteps[index]))
    for wrong in ((begun, 0.0), (begun, 1.1), (begun[..., :32], 0.5), (begun * 3, 0.5), begun, (begun,)):
        with pytest.raises(InputError, match="strength|start"):
            stage1(start=wrong, **given)


def test_a_cascades_pictures_keep_the_references_component(cascade):
    sample = {"prompts": ["a duck", "a cat"], "views": ["identity", "flip"], "size": 16}
    photo, calls = picture(64) * 0.3, []
    small = F.interpolate(photo[None], (16, 16), mode="bilinear", antialias=True)[0]

    def dimmer(x, index, t_next):
        calls.append(index)
        return x * 0.4  # so that no value leaves the range

    run = cascade.sample(
        seeds=[3, 4], recipe=PLAIN, reference=photo, reference_view="grayscale", after=dimmer, **sample
    )
    for size, wanted in ((16, small), (64, photo)):
        found = run.pictures[size].mean(1)
        torch.testing.assert_close(found, wanted.mean(0).expand_as(found), rtol=0, atol=5e-3)  # 8 bits
    assert calls == [0, 1, 2, 3, 4] * 2  # a rule of one's own goes on
    run = cascade.sample(recipe=Recipe.released(num_inference_steps=2), reference=photo, **sample)
    assert next(run).state.loss is not None  # and so does anti-segregation


def test_less_strength_leaves_more_of_the_start_in_each_stage(cascade):
    photo, sample = picture(64), {"prompts": ["a duck"], "views": ["flip"], "recipe": PLAIN, "size": 16}
    small = F.interpolate(photo[None], (16, 16), mode="bilinear", antialias=True)[0]

    def moved(strength, size, start):
        made = cascade.sample(start_from=photo, strength=strength, **sample).pictures[size]
        return (made - start).abs().mean()

    assert moved(0.2, 16, small) < moved(0.6, 16, small) < moved(1, 16, small)
    large = [moved(strength, 64, photo) for strength in ([0, 0.2], [0, 0.6], [0, 1], 0)]
    assert large == sorted(set(large))
    run = cascade.sample(start_from=photo, strength=[0, 0.4], **sample)
    assert [(step.stage, step.state.index) for step in run] == [(1, 4), (2, 3), (2, 4)]
    torch.testing.assert_close(run.pictures[16][0], small, rtol=0, atol=1e-6)


def test_stage_2_alone_enlarges_a_picture(cascade):
    small = picture(16)
    run = cascade.sample(["a duck"], ["flip"], 7, recipe=PLAIN, size=16, start_from=small, strength=0)
    text, null = cascade.encode(["a duck"])
    *_, last = sample_stage2(
        cascade.unet_2, small[None], text, null, run.views, score=None, generators=generators(7), recipe=PLAIN,
        size=64, schedule=cascade.schedule(2, 5),
    )  # fmt: skip
    torch.testing.assert_close(run.pictures[64], last.x)
    torch.testing.assert_close(run.pictures[16][0], small)


REQUESTS = [
    {"start_from": "photo.png", "strength": 0.5},
    {"start_from": "photo.png", "strength": [0, 0.5], "views": ["low_pass", "rotate_180+high_pass"]},
    {"reference": "photo.png", "reference_view": "motion:5,30", "start_from": "other.png"},
]


@pytest.mark.parametrize("changes", REQUESTS, ids=lambda changes: ",".join(changes))
def test_files_metadata_and_the_same_picture_again(make, cascade, tmp_path, changes):
    for i, name in enumerate(("photo.png", "other.png")):
        save_picture(tmp_path / name, picture(128, seed=i))
    named = {k: tmp_path / v if str(v).endswith("png") else v for k, v in changes.items()}
    made = make(**named)[0]
    own = {name for name in changes if name in ("start_from", "reference")}
    assert {f"{name}.png" for name in own} <= set(files(made.folder))
    assert set(metadata(made)["request"]) & {"start_from", "reference"} == own
    assert make(**named, on_step=never)[0].skipped
    for name in own:  # a tensor of the same pixels is the same picture; another one is not
        assert make(**named | {name: read_picture(made.folder / f"{name}.png")}, on_step=never)[0].skipped
        with pytest.raises(InputError, match=f"different: {name}"):
            make(**named | {name: picture(32, seed=9)}, on_step=never)
    again = repeat_anagram(made.folder / "metadata.json", tmp_path / "again", model=cascade)
    assert files(again.folder) == files(made.folder)
    copied = shutil.copytree(made.folder, tmp_path / "copied")
    save_picture(copied / f"{min(own)}.png", picture(32, seed=9))
    with pytest.raises(InputError, match="not the picture that was there"):
        repeat_anagram(copied, tmp_path / "b", model=cascade)
    (copied / f"{min(own)}.png").unlink()
    with pytest.raises(SourceError, match=f"{min(own)}.png"):
        repeat_anagram(copied, tmp_path / "b", model=cascade)


WRONG = [
    ({"reference": picture(16, 24)}, "reference is 24 x 16 px.*crop"),
    ({"start_from": "none.jpg"}, "none.jpg.*check its path"),
    ({"start_from": __file__}, "test_given.py.*no.*picture"),
    ({"start_from": picture(16) * 200}, "start_from has values up to"),
    ({"start_from": picture(16), "strength": 1.5}, "strength=1.5.*at most 1"),
    ({"start_from": picture(16), "strength": [0.5, 0]}, "strength=0.*above 0"),
    ({"start_from": picture(16), "strength": 0, "stop_after": 16}, "a stage II must follow"),
    ({"strength": 0.5}, "start_from="),
    ({"reference_view": "low_pass"}, "reference="),
    ({"reference": picture(16), "reference_view": "flip"}, "must be a component"),
]


@pytest.mark.parametrize("changes,match", WRONG, ids=[match for _, match in WRONG])
def test_what_cannot_be_used_is_refused_at_the_call(cascade, changes, match):
    with pytest.raises((InputError, SourceError), match=match):
        cascade.sample(["a duck"], ["identity"], **{"recipe": PLAIN, "size": 16, **changes})
