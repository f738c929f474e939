"""Cascade: the layouts it reads, what it loads and when, where models live, checksums, embedded weights."""

import hashlib
import json
import shutil
import weakref

import huggingface_hub
import pytest
import torch

import mtl_anagram.cascade as module
from mtl_anagram import Cascade, ConfigError, InputError, Recipe, SourceError, generate_anagram
from mtl_anagram.cascade import embedded_folder
from mtl_anagram.checksums import combined_checksum
from mtl_anagram.models import load_t5, load_tokenizer
from mtl_anagram.sampling import Schedule

pytestmark = pytest.mark.usefixtures("one_thread")
LOADERS = ("load_unet", "load_t5", "load_tokenizer", "load_noise_clip")
MODELS = ("unet_1", "unet_2", "text_encoder", "tokenizer", "noise_clip")
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "thresholding": False,
    "clip_sample": True,
    "clip_sample_range": 0.5,
    "variance_type": "learned_range",
}


@pytest.fixture
def own_folder(cascade_folder, tmp_path):
    """A copy of the tiny cascade whose files a test may change."""
    return shutil.copytree(cascade_folder, tmp_path / "own")


@pytest.fixture
def calls(monkeypatch):
    """Every call of a loader, as (its name, its source, its keyword arguments); the loaders load nothing."""
    seen = []

    def stand_in(name):
        def load(source, **options):
            seen.append((name, source, options))
            return object()

        return load

    for name in LOADERS:
        monkeypatch.setattr(module, name, stand_in(name))
    return seen


def picture(cascade, folder, **changes):
    """The bytes of a small picture's PNG, of the last stage there is."""
    request = {
        "style": "",
        "prompts": ["a duck", "a rabbit"],
        "views": ["identity", "rotate_cw"],
        "num_inference_steps": 2,
        "size": 16,
    }
    (made,) = generate_anagram(**{**request, **changes}, save_dir=folder, model=cascade)
    return list(made.pictures.values())[-1].read_bytes()


def test_a_cascades_folder(cascade_folder):
    cascade = Cascade.from_pretrained(cascade_folder, device="cpu")
    assert (cascade.name, cascade.device, cascade.dtype) == ("tiny", torch.device("cpu"), torch.float32)
    assert cascade.has_stage_2
    assert cascade.has_noise_clip
    assert cascade.recipe == Recipe.released()
    assert cascade.unet_1.config.sample_size in (None, 64)
    assert cascade.unet_2.config.in_channels == 6
    for name in ("unet_1", "unet_2", "text_encoder", "noise_clip"):
        parameters = list(getattr(cascade, name).parameters())
        assert {(p.dtype, p.device.type, p.requires_grad) for p in parameters} == {
            (torch.float32, "cpu", False)
        }


def test_parts_of_a_folder_may_be_missing(own_folder):
    shutil.rmtree(own_folder / "stage_2")
    (own_folder / "cascade.json").unlink()
    cascade = Cascade.from_pretrained(str(own_folder), device="cpu")
    assert (cascade.name, cascade.has_stage_2, cascade.has_noise_clip) == ("own", False, True)
    with pytest.raises(InputError, match="own has no stage_2.*stage_2="):
        _ = cascade.unet_2
    assert not any(name.startswith("stage_2") for name in cascade.checksums())
    shutil.rmtree(own_folder / "noise_clip")
    cascade = Cascade.from_pretrained(own_folder, device="cpu")
    assert not cascade.has_noise_clip
    with pytest.raises(InputError, match="no noise_clip"):
        _ = cascade.noise_clip


def test_named_parts_go_before_the_folders_own(cascade_folder, calls):
    cascade = Cascade.from_pretrained(cascade_folder, stage_2="x/two", noise_clip="x/clip", device="cpu")
    _ = cascade.unet_2, cascade.noise_clip, cascade.unet_1
    assert [source for _, source, _ in calls] == ["x/two", "x/clip", cascade_folder / "stage_1"]


def test_one_releases_folder(cascade_folder, cascade, tmp_path):
    first, second = cascade_folder / "stage_1", cascade_folder / "stage_2"
    alone = Cascade.from_pretrained(first, device="cpu")
    assert (alone.name, alone.has_stage_2, alone.has_noise_clip) == (str(first), False, False)
    apart = Cascade.from_pretrained(
        str(first), stage_2=second, noise_clip=cascade_folder / "noise_clip", device="cpu"
    )
    assert apart.checksums() == cascade.checksums()
    assert picture(apart, tmp_path / "a") == picture(cascade, tmp_path / "b")


def test_the_unets_own_folder_will_do_for_stage_2(cascade_folder, cascade, tmp_path):
    apart = Cascade.from_pretrained(
        cascade_folder / "stage_1",
        stage_2=cascade_folder / "stage_2" / "unet",
        noise_clip=cascade_folder / "noise_clip",
        device="cpu",
    )
    assert apart.checksums() == cascade.checksums()
    assert picture(apart, tmp_path / "a") == picture(cascade, tmp_path / "b")


def test_a_hub_id_is_not_looked_up_before_it_is_needed(monkeypatch):
    asked = []

    def download(repo_id, name, **options):
        asked.append((repo_id, name))
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    cascade = Cascade.from_pretrained("owner/stage-one", stage_2="owner/stage-two", device="cpu")
    assert (cascade.name, cascade.has_stage_2, cascade.has_noise_clip) == ("owner/stage-one", True, False)
    assert asked == []
    with pytest.raises(SourceError, match="owner/stage-two"):
        _ = cascade.unet_2
    assert asked == [("owner/stage-two", "config.json")]


def test_sources_that_are_no_cascade(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="neither stage_1/ nor unet/"):
        Cascade.from_pretrained(tmp_path / "empty")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SourceError, match="is a file"):
        Cascade.from_pretrained(tmp_path / "file")
    with pytest.raises(SourceError, match="no folder on this machine"):
        Cascade.from_pretrained(tmp_path / "nowhere")


def test_nothing_is_loaded_before_it_is_used_and_then_once(cascade_folder, calls):
    cascade = Cascade.from_pretrained(cascade_folder, device="cpu")
    assert calls == []
    for name in MODELS:
        assert getattr(cascade, name) is getattr(cascade, name)
    assert sorted(name for name, _, _ in calls) == sorted([*LOADERS, "load_unet"])


def test_release_forgets(cascade_folder, calls):
    cascade = Cascade.from_pretrained(cascade_folder, device="cpu")
    first = {name: getattr(cascade, name) for name in MODELS}
    cascade.release("unet_1", "noise_clip")
    again = {name: getattr(cascade, name) for name in MODELS}
    assert {name for name in MODELS if first[name] is not again[name]} == {"unet_1", "noise_clip"}
    cascade.release()
    assert all(getattr(cascade, name) is not again[name] for name in MODELS)
    cascade.release("unet_1")
    cascade.release("unet_1")  # nothing to forget is no error


def test_release_gives_the_memory_back(cascade_folder):
    cascade = Cascade.from_pretrained(cascade_folder, device="cpu")
    kept = weakref.ref(cascade.unet_1)
    cascade.release("unet_1")
    assert kept() is None


def test_models_get_the_device_the_dtype_and_the_variant(cascade_folder, calls):
    cascade = Cascade.from_pretrained(cascade_folder, device="cpu", dtype="bfloat16", variant="fp16")
    for name in MODELS:
        getattr(cascade, name)
    options = {(name, str(source)): given for name, source, given in calls}
    for stage in ("stage_1", "stage_2"):
        assert options["load_unet", str(cascade_folder / stage)] == {
            "variant": "fp16",
            "dtype": torch.bfloat16,
            "device": torch.device("cpu"),
        }
    assert options["load_noise_clip", str(cascade_folder / "noise_clip")] == {
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    # A variant's files mix dtypes on purpose, and are taken as they are.
    assert options["load_t5", str(cascade_folder / "stage_1")] == {
        "variant": "fp16",
        "dtype": None,
        "device": torch.device("cpu"),
    }


def test_the_default_dtype_depends_on_the_device(cascade_folder, monkeypatch):
    monkeypatch.setattr(module, "resolve_device", lambda device: torch.device(device or "cuda"))
    assert Cascade.from_pretrained(cascade_folder).dtype == torch.float16
    assert Cascade.from_pretrained(cascade_folder, dtype="bfloat16").dtype == torch.bfloat16
    assert Cascade.from_pretrained(cascade_folder, device="mps").dtype == torch.float32
    assert Cascade.from_pretrained(cascade_folder, device="cpu", dtype=torch.float16).dtype == torch.float16


def test_wrong_devices_and_dtypes(cascade_folder):
    with pytest.raises(InputError, match="no device"):
        Cascade.from_pretrained(cascade_folder, device="gpu")
    with pytest.raises(InputError, match="dtype='half'"):
        Cascade.from_pretrained(cascade_folder, dtype="half")


def test_t5_is_kept_out_of_half_precision(cascade_folder):
    cascade = Cascade.from_pretrained(cascade_folder, device="cpu", dtype="float16")
    assert {p.dtype for p in cascade.text_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in cascade.unet_1.parameters()} == {torch.float16}
    assert {p.dtype for p in cascade.noise_clip.parameters()} == {torch.float32}
    text, null = cascade.encode(["a duck"])
    assert text.dtype == null.dtype == torch.float16


def test_encode(cascade_folder, cascade):
    text, null = cascade.encode(["a duck", "a rabbit"])
    assert text.shape == (2, 77, 16)
    assert null.shape == (1, 77, 16)
    assert not text.requires_grad
    ids, mask = load_tokenizer(cascade_folder / "stage_1")(["a rabbit", ""], max_length=77)
    expected = load_t5(cascade_folder / "stage_1")(ids, mask)
    torch.testing.assert_close(torch.stack([text[1], null[0]]), expected, rtol=0, atol=1e-5)


def test_models_loaded_in_inference_mode_can_be_guided(cascade_folder, cascade, tmp_path):
    """Tensors made in inference mode would break the anti-segregation's gradient, now or in a later call."""
    expected = picture(cascade, tmp_path / "a")
    fresh = Cascade.from_pretrained(cascade_folder, device="cpu")
    with torch.inference_mode():
        assert picture(fresh, tmp_path / "b") == expected
        assert torch.is_inference_mode_enabled()
    assert picture(fresh, tmp_path / "c") == expected


def test_the_recipe_of_cascade_json(own_folder, tmp_path):
    values = {"num_inference_steps": 2, "balancing": False, "guidance_scale": 3.0}
    (own_folder / "cascade.json").write_text(json.dumps({"name": "own", "recipe": values}))
    cascade = Cascade.from_pretrained(own_folder, device="cpu")
    assert cascade.recipe == Recipe.released(**values)
    made = generate_anagram("", ["a duck"], ["identity"], tmp_path / "out", size=16, model=cascade)
    metadata = json.loads((made[0].folder / "metadata.json").read_text())
    assert metadata["request"]["recipe"] == cascade.recipe.to_dict()
    assert metadata["weights"]["name"] == "own"


def test_a_recipe_with_unknown_fields(own_folder):
    (own_folder / "cascade.json").write_text(json.dumps({"recipe": {"balance": True}}))
    with pytest.raises(InputError, match="'balance'; did you mean 'balancing'"):
        Cascade.from_pretrained(own_folder)


def test_schedules_without_a_file_are_ifs(cascade):
    for stage, expected in ((1, Schedule.stage_1(7)), (2, Schedule.stage_2(7))):
        assert vars(cascade.schedule(stage, 7)).keys() == vars(expected).keys()
        assert torch.equal(cascade.schedule(stage, 7).alphas_cumprod, expected.alphas_cumprod)
        assert cascade.schedule(stage, 7).variance_type == expected.variance_type
        assert list(cascade.schedule(stage, 7).timesteps) == list(expected.timesteps)


@pytest.mark.parametrize("place", ["scheduler", "."])
def test_schedules_come_from_the_release(own_folder, cascade, tmp_path, place):
    """Also where the file lies beside the models' folders."""
    for stage in ("stage_1", "stage_2"):
        (own_folder / stage / place).mkdir(exist_ok=True)
        (own_folder / stage / place / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    own = Cascade.from_pretrained(own_folder, device="cpu")
    for stage in (1, 2):
        schedule = own.schedule(stage, 5)
        assert (schedule.thresholding, schedule.clip_sample_range) == (False, 0.5)
        assert schedule.num_inference_steps == 5
    assert "stage_1/scheduler/scheduler_config.json" in own.checksums()
    assert "stage_2/scheduler/scheduler_config.json" in own.checksums()
    for stop in (16, 64):
        changed = picture(own, tmp_path / f"a{stop}", stop_after=stop)
        assert changed != picture(cascade, tmp_path / f"b{stop}", stop_after=stop)


def test_a_schedule_that_is_not_implemented(own_folder):
    (own_folder / "stage_1" / "scheduler").mkdir()
    path = own_folder / "stage_1" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**SCHEDULER, "prediction_type": "v_prediction"}))
    with pytest.raises(ConfigError, match="v_prediction"):
        Cascade.from_pretrained(own_folder, device="cpu").schedule(1, 5)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_checksums_are_of_every_file_used(cascade_folder, cascade):
    files = {
        str(path.relative_to(cascade_folder)): sha256(path)
        for path in cascade_folder.rglob("*")
        if path.is_file() and path.name != "cascade.json"
    }
    assert cascade.checksums() == files
    assert len(files) == 10


@pytest.mark.parametrize(
    "name", ["stage_1/tokenizer/spiece.model", "stage_2/unet/config.json", "noise_clip/merges.txt"]
)
def test_checksums_tell_changed_files(own_folder, cascade, name):
    path = own_folder / name
    path.write_bytes(path.read_bytes() + b" ")
    changed = Cascade.from_pretrained(own_folder, device="cpu").checksums()
    assert {key for key in changed if changed[key] != cascade.checksums()[key]} == {name}
    assert combined_checksum(changed) != combined_checksum(cascade.checksums())


def test_combined_checksum():
    one, two = {"a": "1", "b": "2"}, {"b": "2", "a": "1"}
    assert combined_checksum(one) == combined_checksum(two)
    others = [{"a": "2", "b": "1"}, {"a": "1"}, {"a": "1", "c": "2"}, {}]
    assert len({combined_checksum(files) for files in (one, *others)}) == 5


def test_the_hubs_cache_is_not_read_again(own_folder, tmp_path):
    """The cache holds large files under their sha256, with links that bear their names."""
    path = own_folder / "stage_1" / "unet" / "diffusion_pytorch_model.safetensors"
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    name = "ab" * 32  # not its checksum, so that reading it would show
    path.rename(blobs / name)
    path.symlink_to(blobs / name)
    small = own_folder / "stage_1" / "unet" / "config.json"
    small_sum = sha256(small)
    small.rename(blobs / ("ab" * 20))  # small files lie there under git's shorter checksum
    small.symlink_to(blobs / ("ab" * 20))
    checksums = Cascade.from_pretrained(own_folder, device="cpu").checksums()
    assert checksums["stage_1/unet/diffusion_pytorch_model.safetensors"] == name
    assert checksums["stage_1/unet/config.json"] == small_sum


def test_embedded_cascade():
    cascade = Cascade.from_pretrained(device="cpu")
    about = json.loads((embedded_folder() / "cascade.json").read_text())
    assert cascade.name == about["name"]
    assert cascade.has_noise_clip
    models = [cascade.unet_1, cascade.text_encoder, cascade.noise_clip]
    models += [cascade.unet_2] if cascade.has_stage_2 else []
    for model in models:
        assert all(torch.isfinite(p).all() and not p.is_meta for p in model.parameters())
    text, null = cascade.encode(["a sketch of a duck"])
    assert text.shape[1] == null.shape[1] == 77
    assert torch.isfinite(text).all()
    assert cascade.noise_clip.embed_text(["a duck"]).shape[0] == 1
    for stage in (1, 2)[: 1 + cascade.has_stage_2]:
        assert cascade.schedule(stage, 30).num_inference_steps == 30


def test_embedded_files_are_those_of_cascade_json():
    folder = embedded_folder()
    listed = json.loads((folder / "cascade.json").read_text())["files"]
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert set(files) - set(listed) == {"README.md", "cascade.json"}
    assert {name: sha256(files[name]) for name in listed} == listed
    used = {name: value for name, value in listed.items() if not name.startswith("judge/")}
    assert Cascade.from_pretrained(device="cpu").checksums() == used
    assert sum(path.stat().st_size for path in files.values()) < 30e6


def test_where_the_embedded_weights_are_looked_for(tmp_path, monkeypatch):
    """Beside the code where installed, beside the package in a checkout; else an error that says so."""
    package = tmp_path / "site" / "mtl_anagram"
    package.mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(package / "cascade.py"))
    with pytest.raises(SourceError, match="reinstall the package, or name another model"):
        Cascade.from_pretrained()
    for folder in (tmp_path / "site" / "weights", package / "weights"):
        folder.mkdir()
        (folder / "cascade.json").write_text("{}")
        assert embedded_folder() == folder
