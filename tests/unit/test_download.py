"""Downloads from a hub that a folder stands for: which files, where to, what is checked, and offline afterwards."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file

import mtl_anagram.download as module
import mtl_anagram.planning as planning
from mtl_anagram import CapacityError, Cascade, InputError, SourceError, generate_anagram
from mtl_anagram.download import HubFile, download, needed_files
from mtl_anagram.memory import Machine
from mtl_anagram.models import glide
from mtl_anagram.releases import LAYOUTS, PLACES, PUBLISHED, RELEASES
from mtl_anagram.sampling import Recipe, UpscaleRecipe
from tests.unit import tiny
from tests.unit.tiny_upscaler import write_upscaler

pytestmark = pytest.mark.usefixtures("one_thread")
REVISION = "0" * 40


class Hub:
    """Repositories as folders; what is asked of it is noted, what it hands out lies in a cache as the client's."""

    def __init__(self, root, cache):
        self.root, self.cache = root, cache
        self.asked, self.gated, self.lies = [], set(), {}

    def model_info(self, repo_id, files_metadata=False):
        assert files_metadata
        if not (self.root / repo_id).is_dir():
            raise errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)
        siblings = []
        for path in sorted(p for p in (self.root / repo_id).rglob("*") if p.is_file()):
            name = path.relative_to(self.root / repo_id).as_posix()
            sha256 = self.lies.get(name, hashlib.sha256(path.read_bytes()).hexdigest())
            large = {"sha256": sha256} if path.suffix in (".safetensors", ".bin", ".model") else None
            siblings.append(SimpleNamespace(rfilename=name, size=path.stat().st_size, lfs=large))
        return SimpleNamespace(siblings=siblings)

    def download(self, repo_id, name, subfolder=None, local_dir=None):
        path = f"{subfolder}/{name}" if subfolder else name
        snapshot = self.cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / REVISION
        if local_dir is None and (snapshot / path).is_file():
            return str(snapshot / path)
        if constants.HF_HUB_OFFLINE:
            raise errors.LocalEntryNotFoundError("offline")
        self.asked.append(f"{repo_id}/{path}")
        if repo_id in self.gated:
            raise errors.GatedRepoError.__new__(errors.GatedRepoError)
        if not (self.root / repo_id).is_dir():
            raise errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)
        origin = self.root / repo_id / path
        if not origin.is_file():
            raise errors.EntryNotFoundError.__new__(errors.EntryNotFoundError)
        target = (snapshot if local_dir is None else local_dir) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin, target)
        references = snapshot.parents[1] / "refs"
        references.mkdir(parents=True, exist_ok=True)
        (references / "main").write_text(REVISION)
        return str(target)


def halve(folder, base, shards=1):
    """Write the fp16 variant beside a model, in one file or in shards with an index."""
    state = {name: value.half() for name, value in load_file(folder / f"{base}.safetensors").items()}
    if shards == 1:
        save_file(state, folder / f"{base}.fp16.safetensors")
        return
    names, weight_map = sorted(state), {}
    for i in range(shards):
        shard = f"{base}.fp16-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: state[name] for name in names[i::shards]}, folder / shard)
        weight_map |= dict.fromkeys(names[i::shards], shard)
    (folder / f"{base}.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def hub(cascade_folder, tmp_path, monkeypatch):
    """IF-M's repositories in miniature, with what a download must leave alone, and GLIDE's CLIP served by file://."""
    root, release = tmp_path / "hub", RELEASES["IF-M"]
    for part in ("stage_1", "stage_2"):
        folder = root / release.part(part)
        shutil.copytree(cascade_folder / part, folder)
        halve(folder / "unet", "diffusion_pytorch_model")
        (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickled twin")
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(
            json.dumps({"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"})
        )
        (folder / "safety_checker").mkdir()
        (folder / "safety_checker" / "model.safetensors").write_bytes(b"never fetched")
        (folder / "README.md").write_text("never fetched")
    halve(root / release.stage_1 / "text_encoder", "model", shards=2)
    shutil.copytree(root / release.stage_1 / "text_encoder", root / release.stage_2 / "text_encoder")
    upscaler = root / release.stage_3 / "tokenizer"
    upscaler.mkdir(parents=True)
    shutil.copyfile(cascade_folder / "noise_clip" / "merges.txt", upscaler / "merges.txt")
    for tower in glide.TOWERS:
        state = load_file(cascade_folder / "noise_clip" / f"{tower}.safetensors")
        torch.save(state, tmp_path / f"{tower}.pt")
        monkeypatch.setitem(glide.PARAMETERS, tower, sum(t.numel() for t in state.values()))
    monkeypatch.setattr(glide, "URL", (tmp_path / "{}.pt").as_uri().replace("%7B%7D", "{}"))
    monkeypatch.setenv("MTL_ANAGRAM_CACHE", str(tmp_path / "ours"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    made = Hub(root, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, *a, **k: made.model_info(*a, **k))
    monkeypatch.setattr(planning, "machine_of", lambda device: Machine("cpu", 1 << 50, 1 << 50))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 50))
    monkeypatch.chdir(tmp_path)
    return made


def if_m(**options):
    """Without stage III, but where a test names it."""
    return Cascade.from_pretrained("IF-M", device="cpu", **{"stage_3": "none", **options})


NEEDED = [
    "DeepFloyd/IF-I-M-v1.0/scheduler/scheduler_config.json",
    "DeepFloyd/IF-I-M-v1.0/text_encoder/config.json",
    "DeepFloyd/IF-I-M-v1.0/text_encoder/model.fp16-00001-of-00002.safetensors",
    "DeepFloyd/IF-I-M-v1.0/text_encoder/model.fp16-00002-of-00002.safetensors",
    "DeepFloyd/IF-I-M-v1.0/text_encoder/model.safetensors.index.fp16.json",
    "DeepFloyd/IF-I-M-v1.0/tokenizer/spiece.model",
    "DeepFloyd/IF-I-M-v1.0/unet/config.json",
    "DeepFloyd/IF-I-M-v1.0/unet/diffusion_pytorch_model.fp16.safetensors",
    "DeepFloyd/IF-II-M-v1.0/scheduler/scheduler_config.json",
    "DeepFloyd/IF-II-M-v1.0/unet/config.json",
    "DeepFloyd/IF-II-M-v1.0/unet/diffusion_pytorch_model.fp16.safetensors",
    "stabilityai/stable-diffusion-x4-upscaler/tokenizer/merges.txt",
]
SMALL = {"num_inference_steps": 1, "size": 16}
WORDS = ("", ["a duck", "a rabbit"], ["identity", "flip"])


def test_exactly_the_needed_files_once_and_offline_afterwards(hub, tmp_path, monkeypatch):
    fetched = download(if_m())
    assert sorted(hub.asked) == NEEDED
    assert len(fetched) == len(NEEDED) - 1 + 3
    assert all(file.verified and file.path.stat().st_size == file.bytes for file in fetched)
    config_first = [name for name in hub.asked if name.endswith((".json", ".safetensors"))]
    assert not config_first[0].endswith(".safetensors")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    made = generate_anagram(*WORDS, tmp_path / "out", **SMALL, model=if_m())
    assert sorted(made[0].pictures) == [16, 64]
    assert len(hub.asked) == len(NEEDED)
    download(if_m())  # looks whether all is there
    assert all(f.present for network in if_m().plan().networks for f in network.files)


def test_a_folder_that_is_a_source_by_itself(hub, tmp_path, monkeypatch):
    download(if_m(), tmp_path / "folder")
    assert sorted(hub.asked) == NEEDED
    shutil.rmtree(hub.root)
    cascade = Cascade.from_pretrained(tmp_path / "folder", device="cpu")
    assert (cascade.name, cascade.variants) == (
        "IF-M",
        {"stage_1": "fp16", "stage_2": "fp16", "stage_3": None, "noise_clip": "fp16"},
    )
    assert generate_anagram(*WORDS, tmp_path / "out", **SMALL, model=cascade)
    assert len(hub.asked) == len(NEEDED)
    assert not (tmp_path / "ours").exists()


def test_a_releases_stage_three(hub, tmp_path, monkeypatch):
    repo_id = RELEASES["IF-M"].stage_3
    shutil.rmtree(hub.root / repo_id)
    write_upscaler(hub.root / repo_id)
    (hub.root / repo_id / "x4-upscaler-ema.ckpt").write_bytes(b"never fetched")
    monkeypatch.setattr("mtl_anagram.releases.PUBLISHED", {})
    options = {"noise_clip": "none", "stage_3": "IF-M", "keep": "one"}
    download(if_m(**options))
    asked = {name.removeprefix(f"{repo_id}/") for name in hub.asked if name.startswith(repo_id)}
    there = {
        p.relative_to(hub.root / repo_id).as_posix() for p in (hub.root / repo_id).rglob("*") if p.is_file()
    }
    assert asked == there - {"x4-upscaler-ema.ckpt"}
    download(if_m(**options), tmp_path / "folder")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    request = {**SMALL, "recipe": Recipe.plain(), "upscale": UpscaleRecipe(num_inference_steps=1)}
    pictures = []
    for i, cascade in enumerate(
        [if_m(**options), Cascade.from_pretrained(tmp_path / "folder", device="cpu")]
    ):
        (made,) = generate_anagram(*WORDS, tmp_path / f"out{i}", **request, model=cascade)
        pictures.append(made.pictures[256].read_bytes())
        if i == 0:
            held = [name for name in (*PLACES, "noise_clip") if cascade._holds(name)]
            assert held == ["unet_3", "autoencoder_3"]  # keep="one": nothing else is left
    assert pictures[0] == pictures[1]


def test_the_full_files_and_mixed_parts(hub, tmp_path):
    cascade = if_m(variant="fp32", stage_2="none", noise_clip="none")
    download(cascade)
    assert [name.rpartition("/")[2] for name in sorted(hub.asked)] == [
        "scheduler_config.json",
        "config.json",
        "model.safetensors",
        "spiece.model",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_what_arrives_is_compared_with_what_the_hub_lists(hub):
    name = "unet/diffusion_pytorch_model.fp16.safetensors"
    hub.lies[name] = "ab" * 32
    with pytest.raises(SourceError, match=f"{name} has sha256 .* lists abab.*delete it and run"):
        download(if_m())
    hub.lies.clear()
    (place,) = hub.cache.glob(f"models--DeepFloyd--IF-I-M-v1.0/snapshots/*/{name}")
    place.write_bytes(place.read_bytes()[:-1])
    with pytest.raises(SourceError, match=f"{name} has .* bytes, DeepFloyd/IF-I-M-v1.0 lists"):
        download(if_m())


def test_a_gate_shows_before_anything_large(hub):
    hub.gated.add("DeepFloyd/IF-I-M-v1.0")
    with pytest.raises(
        SourceError, match="IF-I-M-v1.0 is gated: accept its licence.*hf auth login.*HF_TOKEN"
    ):
        download(if_m())
    assert not any(name.endswith("safetensors") for name in hub.asked)


def test_a_disk_that_is_too_small(hub, monkeypatch):
    total = sum(file.bytes for part in ("stage_1", "stage_2") for file in listed(hub, part).values())
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CapacityError, match="has 1,000 bytes free.*need") as caught:
        download(if_m(noise_clip="none"))
    assert f"{total:,}" in str(caught.value)
    assert hub.asked == []
    (hub.cache / "models--DeepFloyd--IF-II-M-v1.0" / "blobs").mkdir(parents=True)
    file = listed(hub, "stage_2")["unet/diffusion_pytorch_model.fp16.safetensors"]
    begun = hub.cache / "models--DeepFloyd--IF-II-M-v1.0" / "blobs" / f"{file.sha256}.incomplete"
    begun.write_bytes(bytes(500))
    with pytest.raises(CapacityError, match=f"{total - 500:,}"):
        download(if_m(noise_clip="none"))


def listed(hub, part):
    repo_id = RELEASES["IF-M"].part(part)
    return needed_files(module.list_files(repo_id), LAYOUTS[part], "fp16", repo_id)


def test_a_machine_that_is_too_small(hub, monkeypatch):
    monkeypatch.setattr(planning, "machine_of", lambda device: Machine("cpu", 8 << 30, 8 << 30))
    with pytest.raises(CapacityError, match="IF-M: text needs about 12.0 GB on cpu.*there are 8.6 GB"):
        download(if_m(text_encoder="whole"))
    with pytest.raises(CapacityError, match="IF-M: text needs"):
        generate_anagram(*WORDS, "out", **SMALL, model=if_m(text_encoder="whole"))
    streamed = if_m()  # in the place of 12 GB
    streamed.check_memory()
    text, *others = streamed.plan().networks
    assert text.streamed
    assert text.memory < 0.5e9
    assert not any(network.streamed for network in others)
    assert not any(name.endswith("safetensors") for name in hub.asked)
    hub.asked.clear()
    download(if_m(ignore_memory=True))
    large = {name for name in NEEDED if name.endswith("safetensors")}
    assert large <= set(hub.asked) <= set(NEEDED)


def test_offline_names_what_is_missing(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        SourceError, match="IF-I-M-v1.0: text_encoder/config.json.*spiece.model is not in .*unset it"
    ):
        download(if_m())


def test_sources_that_cannot_be_downloaded(hub, tmp_path, cascade_folder):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="is a file; name a folder"):
        download(if_m(), tmp_path / "file")
    with pytest.raises(InputError, match="stage_2 is the folder"):
        download(if_m(stage_2=cascade_folder / "stage_2"), tmp_path / "to")
    with pytest.raises(SourceError, match="no such repository"):
        download(if_m(stage_2="owner/none"))
    assert download(Cascade.from_pretrained(cascade_folder, device="cpu")) == []


def test_the_needed_files_of_every_published_repository():
    """From a listing of all that such a repository holds, in both variants."""
    for repo_id, layout in PUBLISHED.items():
        names = [name for network in layout.networks for v in (None, "fp16") for name in network.names(v)]
        names += [f"{network.subfolder}/config.json" for network in layout.networks]
        names += [*layout.required, *layout.optional, "README.md", "safety_checker/model.safetensors"]
        listing = {name: HubFile(name, 1, None) for name in names}
        for variant in (None, "fp16"):
            found = needed_files(listing, layout, variant, repo_id)
            weights = {name for network in layout.networks for name in network.names(variant)}
            assert {name for name in found if "safetensors" in name} == weights
    with pytest.raises(SourceError, match="has no unet/diffusion_pytorch_model.bf16.safetensors"):
        needed_files(listing, LAYOUTS["stage_2"], "bf16", "x/y")


def test_progress_bars_are_left_as_they_were(hub):
    from huggingface_hub.utils import are_progress_bars_disabled

    before = are_progress_bars_disabled()
    download(if_m())
    assert are_progress_bars_disabled() == before


def test_tiny_release_is_no_real_one():
    """The stand-in has the real names and none of the real sizes."""
    assert PUBLISHED["DeepFloyd/IF-I-M-v1.0"].networks[1].parameters == 371_605_830
    assert tiny.STAGE_1["block_out_channels"][0] == 8
