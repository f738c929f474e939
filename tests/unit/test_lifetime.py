"""When a run loads its networks and when it lets them go: each once, one after the other, for the same pictures."""

import json
import weakref

import pytest
import torch

from mtl_anagram import InputError, WeightsError
from mtl_anagram.cascade import models
from mtl_anagram.models.machine import Memory
from tests.unit.tiny_requests import on_cpu, sample


@pytest.fixture
def loads(monkeypatch):
    """Every load in order, as (network, which others were alive then); the loaders really load."""
    alive, seen = {}, []

    def wrap(loader, name_of):
        load = getattr(models, loader)

        def watched(source, **options):
            name = name_of(source)
            seen.append((name, {other for other, reference in alive.items() if reference() is not None}))
            loaded = load(source, **options)
            alive[name] = weakref.ref(loaded)
            return loaded

        monkeypatch.setattr(models, loader, watched)

    wrap("load_unet", lambda source: "unet_2" if "stage_2" in str(source) else "unet_1")
    wrap("load_t5", lambda source: "text_encoder")
    wrap("load_noise_clip", lambda source: "noise_clip")
    return seen


def test_one_at_a_time_loads_each_once_after_the_one_before_is_gone(cascade_folder, loads):
    run = sample(on_cpu(cascade_folder, keep="one"), [3, 4, 5], batch_size=2)
    order = list(dict.fromkeys((step.seeds, step.stage) for step in run))
    assert order == [((3, 4), 1), ((5,), 1), ((3, 4), 2), ((5,), 2)]
    alone = [("text_encoder", set()), ("noise_clip", set())]
    assert loads == [*alone, ("unet_1", {"noise_clip"}), ("unet_2", {"noise_clip"})]
    pictures = run.pictures
    del run
    loads.clear()
    all_in = sample(on_cpu(cascade_folder, keep="all"), [3, 4, 5], batch_size=2)
    order = list(dict.fromkeys((step.seeds, step.stage) for step in all_in))
    assert order == [((3, 4), 1), ((3, 4), 2), ((5,), 1), ((5,), 2)]
    assert [name for name, _ in loads] == ["text_encoder", "noise_clip", "unet_1", "unet_2"]
    assert loads[-1][1] == {"text_encoder", "noise_clip", "unet_1"}
    assert all(torch.equal(other, pictures[size]) for size, other in all_in.pictures.items())


def test_auto_keeps_all_where_there_is_room_and_one_where_there_is_not(cascade_folder, monkeypatch):
    def keeps(free):
        found = None if free is None else Memory(free, free)
        monkeypatch.setattr(models, "memory_of", lambda device: found)
        return on_cpu(cascade_folder).keeps_all

    weights = sum(path.stat().st_size for path in cascade_folder.rglob("*.safetensors"))
    assert keeps(3 * weights)
    assert not keeps(weights)
    assert not keeps(None)
    with pytest.raises(InputError, match="keep="):
        on_cpu(cascade_folder, keep="none")


def test_damage_in_stage_2_shows_before_stage_1_is_sampled(own_folder):
    path = own_folder / "stage_2" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers_per_block": [1, 1, 1, 1, 2]}))
    with pytest.raises(WeightsError, match="stage_2.*missing"):
        next(sample(on_cpu(own_folder, keep="one")))
