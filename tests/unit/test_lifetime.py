"""When a run loads its networks and when it lets them go: each once, one after the other, for the same pictures."""

import gc
import json
import weakref

import pytest
import torch

import mtl_anagram.cascade as module
import mtl_anagram.planning as planning
from mtl_anagram import CapacityError, Cascade, InputError, WeightsError, generate_anagram
from mtl_anagram.memory import Machine
from tests.unit import tiny

pytestmark = pytest.mark.usefixtures("one_thread")
REQUEST = {
    "style": "",
    "prompts": ["a duck", "a rabbit"],
    "views": ["identity", "rotate_cw"],
    "seed": [3, 4, 5],
    "num_inference_steps": 2,
    "size": 16,
    "batch_size": 2,
}


@pytest.fixture
def loads(monkeypatch):
    """Every load in order, as (network, which others were alive then); the loaders really load."""
    alive, seen = {}, []

    def wrap(loader, name_of):
        load = getattr(module, loader)

        def watched(source, **options):
            gc.collect()
            name = name_of(source)
            seen.append((name, {other for other, reference in alive.items() if reference() is not None}))
            loaded = load(source, **options)
            alive[name] = weakref.ref(loaded)
            return loaded

        monkeypatch.setattr(module, loader, watched)

    wrap("load_unet", lambda source: "unet_2" if "stage_2" in str(source) else "unet_1")
    wrap("load_t5", lambda source: "text_encoder")
    wrap("load_noise_clip", lambda source: "noise_clip")
    return seen


def run(folder, out, **changes):
    cascade = Cascade.from_pretrained(folder, device="cpu", **changes)
    made = generate_anagram(**REQUEST, save_dir=out, model=cascade)
    return {(a.seed, side): path.read_bytes() for a in made for side, path in a.pictures.items()}


def test_one_at_a_time_loads_each_once_after_the_one_before_is_gone(cascade_folder, tmp_path, loads):
    """Three seeds in two batches: both pass stage I before stage II is loaded."""
    pictures = run(cascade_folder, tmp_path / "one", keep="one")
    assert loads == [
        ("text_encoder", set()),
        ("noise_clip", set()),
        ("unet_1", {"noise_clip"}),
        ("unet_2", {"noise_clip"}),
    ]
    loads.clear()
    assert run(cascade_folder, tmp_path / "all", keep="all") == pictures
    assert [name for name, _ in loads] == ["text_encoder", "noise_clip", "unet_1", "unet_2"]
    assert loads[-1][1] == {"text_encoder", "noise_clip", "unet_1"}
    assert len(pictures) == 6


@pytest.mark.parametrize(
    "keep, order",
    [
        ("all", [([3, 4], 1), ([3, 4], 2), ([5], 1), ([5], 2)]),
        ("one", [([3, 4], 1), ([5], 1), ([3, 4], 2), ([5], 2)]),
    ],
)
def test_the_order_of_batches_and_stages(cascade_folder, tmp_path, keep, order):
    seen = []

    def watch(seeds, stage, state):
        if (seeds, stage) not in seen:
            seen.append((seeds, stage))

    cascade = Cascade.from_pretrained(cascade_folder, device="cpu", keep=keep)
    generate_anagram(**REQUEST, save_dir=tmp_path, model=cascade, on_step=watch)
    assert seen == order


def machine(monkeypatch, total, free=None):
    found = Machine("cpu", total, total if free is None else free)
    monkeypatch.setattr(planning, "machine_of", lambda device: found)


def test_auto_keeps_all_where_there_is_room_and_one_where_there_is_not(cascade_folder, monkeypatch):
    def keeps(**memory):
        machine(monkeypatch, **memory)
        return Cascade.from_pretrained(cascade_folder, device="cpu").keeps_all

    together = Cascade.from_pretrained(cascade_folder, device="cpu").plan(size=16).together
    assert keeps(total=100 << 30)
    assert not keeps(total=100 << 30, free=together // 2)
    monkeypatch.setattr(planning, "machine_of", lambda device: None)
    assert not Cascade.from_pretrained(cascade_folder, device="cpu").keeps_all


def test_a_users_own_order_reloads(cascade_folder, loads):
    """keep="one" means what it says for single networks, too."""
    cascade = Cascade.from_pretrained(cascade_folder, device="cpu", keep="one")
    _ = cascade.unet_1, cascade.noise_clip, cascade.unet_1, cascade.unet_2, cascade.unet_1
    assert [name for name, _ in loads] == ["unet_1", "noise_clip", "unet_2", "unet_1"]
    assert all("unet_2" not in alive or name == "noise_clip" for name, alive in loads[:3])


def test_damage_in_stage_2_shows_before_stage_1_is_sampled(tmp_path, loads):
    folder = tiny.write_cascade(tmp_path / "own")
    path = folder / "stage_2" / "unet" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "layers_per_block": [1, 1, 1, 1, 2]}))
    steps = []
    cascade = Cascade.from_pretrained(folder, device="cpu", keep="one")
    with pytest.raises(WeightsError, match="stage_2.*tensors missing"):
        generate_anagram(
            **REQUEST, save_dir=tmp_path / "out", model=cascade, on_step=lambda *_: steps.append(1)
        )
    assert steps == []
    assert "unet_1" not in [name for name, _ in loads]
    weights = folder / "stage_2" / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_text(json.dumps(config))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OSError, match="not a whole safetensors file"):
        generate_anagram(**REQUEST, save_dir=tmp_path / "out", model=cascade)


def test_a_machine_that_cannot_hold_a_stage(cascade_folder, tmp_path, monkeypatch, loads):
    machine(monkeypatch, planning.OVERHEAD["cpu"] + (1 << 20))
    cascade = Cascade.from_pretrained(cascade_folder, device="cpu")
    remedy = "smaller release.*smaller batch.*ignore_memory=True"
    with pytest.raises(CapacityError, match=f"tiny: stage I needs about.*{remedy}"):
        generate_anagram(**REQUEST, save_dir=tmp_path / "out", model=cascade)
    assert loads == []
    assert not (tmp_path / "out").exists()
    machine(monkeypatch, planning.OVERHEAD["cpu"] + 1000)
    with pytest.raises(CapacityError, match="unet_1 needs about"):
        _ = cascade.unet_1
    assert loads == []
    free = Cascade.from_pretrained(cascade_folder, device="cpu", ignore_memory=True)
    assert generate_anagram(**REQUEST, save_dir=tmp_path / "out", model=free)


def test_all_together_may_be_too_much_where_each_stage_fits(cascade_folder, monkeypatch):
    plan = Cascade.from_pretrained(cascade_folder, device="cpu").plan(size=16)
    largest = max(stage.needed for stage in plan.stages)
    assert plan.together > largest
    monkeypatch.setattr(planning, "is_small", lambda cascade: False)
    machine(monkeypatch, (plan.together + largest) // 2)
    for keep in ("auto", "one"):
        cascade = Cascade.from_pretrained(cascade_folder, device="cpu", keep=keep)
        cascade.check_memory(views=2, batch_size=1, sizes=[16, 64], guided=True)
        assert not cascade.keeps_all
    cascade = Cascade.from_pretrained(cascade_folder, device="cpu", keep="all")
    with pytest.raises(CapacityError, match='keep="one"'):
        cascade.check_memory(views=2, batch_size=1, sizes=[16, 64], guided=True)


@pytest.mark.parametrize("option", [{"keep": "none"}, {"keep": None}, {"ignore_memory": 1}])
def test_wrong_options(cascade_folder, option):
    with pytest.raises(InputError, match=next(iter(option))):
        Cascade.from_pretrained(cascade_folder, **option)


def test_the_layout_reads_no_weights(cascade_folder, loads):
    cascade = Cascade.from_pretrained(cascade_folder, device="cpu")
    assert cascade.layout(2).config.in_channels == 6
    assert all(parameter.is_meta for parameter in cascade.layout(1).parameters())
    assert loads == []
    assert cascade.unet_1 is cascade.layout(1)
    assert not torch.nn.utils.parameters_to_vector(cascade.unet_1.parameters()).is_meta
