"""Cascade.sample: pictures in memory, step by step, with rules and parts of one's own."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mtl_anagram import Cascade, InputError, PromptWarning, Recipe, View
from mtl_anagram.files.images import encode_png
from mtl_anagram.models import UNet
from mtl_anagram.sampling import DDIM, Schedule
from tests.unit.tiny import STAGE_1, STAGE_2, TWO_LEVELS, write_unet
from tests.unit.tiny_requests import files, first_takes_all, metadata, on_cpu, sample


def same(one, other):
    """Whether two runs' pictures are equal, by size."""
    return {size: torch.equal(pictures, other.pictures[size]) for size, pictures in one.pictures.items()}


def test_pictures_in_memory_are_those_of_generate_anagrams_files(make, cascade, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = sample(cascade, [3, 1, 2, 3], style="a sketch of", views=["identity", "rotate_cw"], batch_size=2)
    assert run.seeds == [3, 1, 2]  # a repeated seed is made once
    assert run.sizes == [8, 32]
    assert run.prompts == ["a sketch of a duck", "a sketch of a rabbit"]
    assert {p.dtype for p in run.pictures.values()} == {torch.float32}
    assert os.listdir(tmp_path) == []
    for i, anagram in enumerate(make(seed=[3, 1, 2], batch_size=2)):
        for size, path in anagram.pictures.items():
            assert path.read_bytes() == encode_png(run.pictures[size][i])


def test_steps_one_by_one_and_stopping(cascade):
    run, calls = sample(cascade, [5, 6, 7], batch_size=2), []
    seen = [(step.seeds, step.stage, step.state.index) for step in run]
    assert seen == [(seeds, stage, i) for seeds in ((5, 6), (7,)) for stage in (1, 2) for i in (0, 1)]

    def count(x, index, t_next):
        calls.append(index)
        return x

    options = {"recipe": Recipe.plain(num_inference_steps=5), "after": count}
    stopped = sample(cascade, **options)
    for step in stopped:
        if step.state.index == 1:
            break
    assert calls == [0, 1]  # nobody asks, nothing runs
    pictures = stopped.pictures  # asked for: the run goes on to its end
    assert len(calls) == 10
    assert torch.equal(pictures[32], sample(cascade, **options).pictures[32])


def test_nothing_done_to_a_state_changes_pictures_or_files(make, cascade):
    def vandal(seeds, stage, state):
        for value in (state.x, state.x0, state.weights, state.scale):
            value.fill_(7.0)

    run = sample(cascade)
    for step in run:
        vandal(*step)
    assert same(run, sample(cascade)) == {8: True, 32: True}
    assert files(make("a", on_step=vandal)[0].folder) == files(make("b")[0].folder)


def test_two_threads_at_once_give_what_one_gives(cascade_folder, cascade):
    fresh = on_cpu(cascade_folder)  # both load its models
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda seed: sample(fresh, seed, negative="a cat").pictures, [1, 2]))
    for seed, pictures in zip((1, 2), runs, strict=True):
        expected = sample(cascade, seed, negative="a cat").pictures
        assert all(torch.equal(pictures[size], expected[size]) for size in (8, 32))


def test_warnings_are_in_the_results(make, cascade):
    prompts = ["a duck", "a big duck"]
    with pytest.warns(PromptWarning, match="'duck'"):
        run = sample(cascade, prompts=prompts)
    assert len(run.warnings) == 1
    for skipped in (False, True):
        with pytest.warns(PromptWarning):
            (made,) = make(prompts=prompts, style="")
        assert (made.skipped, made.warnings) == (skipped, tuple(run.warnings))
    assert sample(cascade).warnings == []


# Rules of one's own


def test_hooks_for_both_stages_or_by_stage(cascade):
    usual = sample(cascade)
    assert same(sample(cascade, combine=first_takes_all), usual) == {8: False, 32: False}
    assert same(sample(cascade, combine={1: first_takes_all}), usual) == {8: False, 32: False}
    assert same(sample(cascade, combine={2: first_takes_all}), usual) == {8: True, 32: False}
    steps = {1: DDIM(Schedule.stage_1(2)), 2: DDIM(Schedule.stage_2(2))}
    named = sample(cascade, recipe=Recipe.released(num_inference_steps=2, solver="ddim"))
    assert same(sample(cascade, step=steps), named) == {8: True, 32: True}
    unguided = sample(cascade, recipe=Recipe.released(num_inference_steps=2, anti_segregation=False))
    assert same(sample(cascade, after=lambda x, index, t_next: (x, None)), unguided) == {8: True, 32: True}
    for wrong in (3, {1: 3}, {3: first_takes_all}, {"1": first_takes_all}):
        with pytest.raises(InputError, match="combine=.*function.*stage"):
            sample(cascade, combine=wrong)


def test_a_run_that_failed_has_no_pictures(cascade):
    run = sample(cascade, combine=lambda prediction, index, t: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(run)
    with pytest.raises(InputError, match="ended by an error"):
        _ = run.pictures


def test_negative_prompts(cascade):
    usual, led = sample(cascade), sample(cascade, negative="a cat")
    assert same(led, usual) == {8: False, 32: False}
    assert same(led, sample(cascade, negative=["a cat", "a cat"])) == {8: True, 32: True}
    assert same(led, sample(cascade, negative=["a cat", "a house"])) == {8: False, 32: False}
    assert same(usual, sample(cascade, negative="")) == {8: True, 32: True}
    for wrong in (["a cat"], 3, [None, "a cat"]):
        with pytest.raises(InputError, match="negative="):
            sample(cascade, negative=wrong)


def test_what_is_given_wins_over_the_recipe_of_cascade_json(own_folder, make):
    recipe = {"num_inference_steps": 3, "guidance_scale": 5.0, "balancing": False}
    (own_folder / "cascade.json").write_text(json.dumps({"name": "own", "recipe": recipe}))
    own = on_cpu(own_folder)
    for given in ({}, {"num_inference_steps": 2}, {"guidance_scale": 10.0}):
        for more in ({}, {"recipe": Recipe.released(**recipe)}):
            request = {"num_inference_steps": None, **more, **given}
            (made,) = make(model=own, stop_after=8, overwrite=True, **request)
            used = metadata(made)["request"]["recipe"]
            assert used == Recipe.released(**{**recipe, **given}).to_dict()


def test_rectangles_through_both_stages(cascade):
    run = sample(cascade, [4, 5], size=(16, 24))
    losses = [step.state.loss is not None for step in run]
    assert losses == [True, False, False, False]
    assert run.sizes == [(16, 24), (64, 96)]
    assert all(run.pictures[size].shape == (2, 3, *size) for size in run.sizes)
    with pytest.raises(InputError, match=r"size=\(16, 24\) px.*'rotate_cw'"):
        sample(cascade, size=(16, 24), views=["identity", "rotate_cw"])
    for wrong in ((), (16, 24, 8), (16, 20)):
        with pytest.raises(InputError, match="multiple of 8"):
            sample(cascade, size=wrong)


SWITCHES = [
    ("balancing", False), ("rectification", False), ("rectify_diagonal", "measured"), ("scorer_range", "signed"),
    ("anti_segregation", False), ("overlap_measure", "iou"), ("overlap_target", 0.1), ("map_places", ("up",)),
    ("map_resolution", 16), ("guidance_rate", 50.0), ("last_guided_step", 0), ("horizon", 1), ("solver", "ddim"),
    ("solver", "dpm_solver_2m"), ("guidance_scale", 9.0), ("guidance_interval", (0.4, 1.0)),
]  # fmt: skip


def test_every_switch_changes_the_picture(cascade):
    recipes = [form(num_inference_steps=3) for form in (Recipe.released, Recipe.corrected, Recipe.plain)]
    recipes += [Recipe.released(num_inference_steps=3, **{name: value}) for name, value in SWITCHES]
    made = [sample(cascade, recipe=recipe, size=16, stop_after=16).pictures[16] for recipe in recipes]
    for i, picture in enumerate(made):
        for other, recipe in zip(made[:i], recipes[:i], strict=True):
            assert (picture - other).abs().max() > 1e-5, f"{recipes[i]} is as {recipe}"


def test_fused_passes_give_the_same_pictures(cascade_folder):
    def made(fused):
        recipe = Recipe.released(num_inference_steps=3)
        return sample(on_cpu(cascade_folder, fused=fused), [1, 2], recipe=recipe).pictures

    slow, fast = made(None), made("torch")
    for size in (8, 32):
        assert (slow[size] - fast[size]).abs().max() < 1e-3  # rounding, which random weights amplify
    with pytest.raises(InputError, match="fused='cuda'"):
        made("cuda")


# Parts of one's own


@pytest.mark.parametrize("keep", ["all", "one"])
def test_a_part_may_be_replaced_until_it_is_released(cascade_folder, cascade, keep):
    own, times = on_cpu(cascade_folder, keep=keep), []
    plain, unet = {"recipe": Recipe.plain(num_inference_steps=2)}, own.unet_1

    def counting(x, t, text):
        times.append(int(t))
        return unet(x, t, text)

    own.unet_1 = counting
    assert own.checksums() != cascade.checksums()  # metadata tells one from the other
    for _ in range(2):
        assert same(sample(own, **plain), sample(cascade, **plain)) == {8: True, 32: True}
    assert times == [500, 0] * 2
    with pytest.raises(InputError, match="no text_maps"):
        next(sample(own))
    own.release("unet_1")
    assert isinstance(own.unet_1, UNet)


def test_a_compiled_cascade_makes_one_graph_for_all_steps_of_a_stage(own_folder):
    """No breaks, by the option (stage I) or as a part of one's own (stage II); token maps stay outside of it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for stage, config in (("stage_1", STAGE_1), ("stage_2", STAGE_2)):
        write_unet(own_folder / stage / "unet", {**config, **TWO_LEVELS})
    plain, own = on_cpu(own_folder), on_cpu(own_folder, compile="eager")
    own.unet_2 = torch.compile(plain.unet_2, backend="eager", fullgraph=True)
    recipe = Recipe.released(num_inference_steps=3)
    expected = sample(plain, recipe=recipe).pictures
    for size, pictures in sample(own, recipe=recipe).pictures.items():
        torch.testing.assert_close(pictures, expected[size], rtol=0, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    with pytest.raises(InputError, match="compile=3"):
        on_cpu(own_folder, compile=3)


def test_a_view_whose_inverse_does_not_undo_it_is_refused_at_the_call(cascade):
    class Shift(View):
        name = "shift"

        def move(self, x):
            return x.roll(1, -1)

        move_back = move

    with pytest.raises(InputError, match="shift.*inverse_view must undo view"):
        sample(cascade, views=["identity", Shift()])


def test_threads_whose_requests_share_batches(cascade_folder):
    """What several threads ask at the same time is joined, what fits no batch waits, what fails fails alone."""
    own, rows = on_cpu(cascade_folder, max_batch=3), []
    own.unet_1.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    words = {"prompts": ("a cat", "a dog"), "views": ("rotate_180", "negate")}
    runs = [sample(own, i, **(words if i % 2 else {})) for i in range(6)] + [sample(own, 6, size=16)]
    asked, broken = [*runs, runs[0]], sample(own, 7)
    broken.text = lambda: 1 / 0
    with ThreadPoolExecutor(8) as pool:
        failed = pool.submit(lambda: broken.pictures)
        made = [future.result() for future in [pool.submit(lambda run=run: run.pictures) for run in asked]]
        assert isinstance(failed.exception(), ZeroDivisionError)
    with pytest.raises(SystemExit):
        _ = sample(own, [8, 9, 10, 11], after=lambda *_: exit(3)).pictures
    assert sample(own, 12).pictures[8].shape == (1, 3, 8, 8)  # what was left undone is nobody else's
    assert max(rows) > 2 * 2  # more than one guided picture of two views
    own.joined = None
    for run, pictures in zip(asked, made, strict=True):
        for size, alone in run.only(run.seeds).pictures.items():
            assert torch.allclose(alone, pictures[size], atol=1e-4)
    with pytest.raises(InputError, match="max_batch=0"):
        Cascade.from_pretrained(cascade_folder, max_batch=0)
