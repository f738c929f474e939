"""Downloads from a hub that a folder stands for: which files, where to, what is refused, and offline afterwards."""

import json
import re
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

import mtl_anagram.models.download as module
import mtl_anagram.models.planning as planning
from mtl_anagram import CapacityError, Cascade, SourceError, generate_anagram
from mtl_anagram.__main__ import main
from mtl_anagram.models.download import download
from mtl_anagram.models.machine import Memory
from mtl_anagram.models.releases import RELEASES
from mtl_anagram.sampling import Recipe, UpscaleRecipe
from tests.unit.test_glide import publish
from tests.unit.test_layouts import lay_out
from tests.unit.tiny_requests import files
from tests.unit.tiny_upscaler import write_upscaler

IF_M = RELEASES["IF-M"]


class Hub:
    """Repositories as folders; what it hands out lies in a cache as the client's, and is noted."""

    def __init__(self, root, cache):
        self.root, self.cache = root, cache
        self.asked, self.gated = [], set()

    def model_info(self, repo_id, files_metadata=False):
        assert files_metadata
        if not (self.root / repo_id).is_dir():
            raise errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)
        there = sorted(files(self.root / repo_id).items())
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n, size=len(c)) for n, c in there])

    def snapshot(self, repo_id, allow_patterns=None, local_dir=None):
        for entry in self.model_info(repo_id, True).siblings:
            if any(fnmatch(entry.rfilename, pattern) for pattern in allow_patterns):
                self.download(repo_id, entry.rfilename, local_dir=local_dir)

    def download(self, repo_id, name, subfolder=None, local_dir=None):
        path = f"{subfolder}/{name}" if subfolder else name
        snapshot = self.cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / ("0" * 40)
        if local_dir is None and (snapshot / path).is_file():
            return str(snapshot / path)
        if constants.HF_HUB_OFFLINE:
            raise errors.LocalEntryNotFoundError("offline")
        if repo_id in self.gated:
            raise errors.GatedRepoError.__new__(errors.GatedRepoError)
        origin = self.root / repo_id / path
        if not origin.is_file():
            raise errors.EntryNotFoundError.__new__(errors.EntryNotFoundError)
        self.asked.append(f"{repo_id}/{path}")
        target = (snapshot if local_dir is None else local_dir) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin, target)
        references = snapshot.parents[1] / "refs"
        references.mkdir(parents=True, exist_ok=True)
        (references / "main").write_text("0" * 40)
        return str(target)


@pytest.fixture
def hub(cascade_folder, tmp_path, monkeypatch):
    """IF-M's repositories in miniature, with what a download must leave alone, and GLIDE's CLIP served by file://."""
    root = tmp_path / "hub"
    scheduler = json.dumps({"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"})
    for part in ("stage_1", "stage_2"):
        folder = root / IF_M[part]
        shutil.copytree(cascade_folder / part, folder)
        lay_out(folder / "unet", "diffusion_pytorch_model", variant="fp16", keep=True)
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(scheduler)
        (folder / "safety_checker").mkdir()
        (folder / "safety_checker" / "model.safetensors").write_bytes(b"never fetched")
        (folder / "README.md").write_text("never fetched")
    lay_out(root / IF_M["stage_1"] / "text_encoder", "model", variant="fp16", shards=2, keep=True)
    shutil.copytree(root / IF_M["stage_1"] / "text_encoder", root / IF_M["stage_2"] / "text_encoder")
    upscaler = root / IF_M["stage_3"] / "tokenizer"
    upscaler.mkdir(parents=True)
    publish(tmp_path / "clip", monkeypatch)
    shutil.copyfile(tmp_path / "clip" / "merges.txt", upscaler / "merges.txt")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    made = Hub(root, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, *a, **k: made.model_info(*a, **k))
    monkeypatch.setattr(planning, "memory_of", lambda device: Memory(1 << 50, 1 << 50))
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 50))
    monkeypatch.chdir(tmp_path)
    return made


def if_m(**options):
    """Without stage III, but where a test names it."""
    return Cascade.from_pretrained("IF-M", device="cpu", **{"stage_3": "none", **options})


def fetch(cascade, to=None):
    about = {"dtype": cascade.dtype, "device": cascade.device, "name": cascade.name}
    found = planning.plan(cascade.sources, cascade.variants, **about)
    return download(found, cascade.sources, cascade.variants, to)


ONE, TWO = "DeepFloyd/IF-I-M-v1.0", "DeepFloyd/IF-II-M-v1.0"
OF_A_STAGE = [
    "scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors",
]  # fmt: skip
OF_T5 = [
    "text_encoder/config.json", "text_encoder/model.fp16-00001-of-00002.safetensors",
    "text_encoder/model.fp16-00002-of-00002.safetensors", "text_encoder/model.safetensors.index.fp16.json",
]  # fmt: skip
NEEDED = [f"{ONE}/{name}" for name in (*OF_A_STAGE, *OF_T5, "tokenizer/spiece.model")]
NEEDED += [f"{TWO}/{name}" for name in OF_A_STAGE]
NEEDED = sorted([*NEEDED, "stabilityai/stable-diffusion-x4-upscaler/tokenizer/merges.txt"])
SMALL = {"num_inference_steps": 1, "size": 16}
WORDS = ("", ["a duck", "a rabbit"], ["identity", "flip"])


def test_exactly_the_needed_files_once_and_offline_afterwards(hub, tmp_path, monkeypatch):
    found = fetch(if_m())
    assert sorted(hub.asked) == NEEDED
    assert all(path.is_file() for path in found.values())
    assert {"stage_2/unet/config.json", "noise_clip/merges.txt"} <= set(found)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    made = generate_anagram(*WORDS, tmp_path / "out", **SMALL, model=if_m())
    assert sorted(made[0].pictures) == [16, 64]
    assert fetch(if_m()) == found  # looks whether all is there
    assert len(hub.asked) == len(NEEDED)


def test_a_folder_that_is_a_source_by_itself(hub, tmp_path):
    fetch(if_m(), tmp_path / "folder")
    assert sorted(hub.asked) == NEEDED
    shutil.rmtree(hub.root)
    cascade = Cascade.from_pretrained(tmp_path / "folder", device="cpu")
    expected = {"stage_1": "fp16", "stage_2": "fp16", "stage_3": None, "noise_clip": "fp16"}
    assert (cascade.name, cascade.variants) == ("IF-M", expected)
    assert generate_anagram(*WORDS, tmp_path / "out", **SMALL, model=cascade)
    assert len(hub.asked) == len(NEEDED)
    assert not (tmp_path / "ours").exists()


def test_a_releases_stage_three(hub, tmp_path, monkeypatch):
    repo_id = IF_M["stage_3"]
    shutil.rmtree(hub.root / repo_id)
    write_upscaler(hub.root / repo_id)
    (hub.root / repo_id / "x4-upscaler-ema.ckpt").write_bytes(b"never fetched")
    options = {"noise_clip": "none", "stage_3": "IF-M", "keep": "one"}
    fetch(if_m(**options))
    asked = {name.removeprefix(f"{repo_id}/") for name in hub.asked if name.startswith(repo_id)}
    assert asked == set(files(hub.root / repo_id)) - {"x4-upscaler-ema.ckpt"}
    fetch(if_m(**options), tmp_path / "folder")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    request = {**SMALL, "recipe": Recipe.plain(), "upscale": UpscaleRecipe(num_inference_steps=1)}
    pictures = []
    for cascade in (if_m(**options), Cascade.from_pretrained(tmp_path / "folder", device="cpu")):
        (made,) = generate_anagram(*WORDS, tmp_path / f"out{len(pictures)}", **request, model=cascade)
        pictures.append(made.pictures[256].read_bytes())
    assert pictures[0] == pictures[1]


def test_the_full_files_and_mixed_parts(hub, cascade_folder):
    fetch(if_m(variant="fp32", stage_2="none", noise_clip="none"))
    assert not any("fp16" in name for name in hub.asked)
    assert len([name for name in hub.asked if name.endswith(".safetensors")]) == 2
    assert fetch(Cascade.from_pretrained(cascade_folder, device="cpu")) == {}


def test_the_tokenizer_that_newer_libraries_save(hub):
    folder = hub.root / IF_M["stage_1"] / "tokenizer"
    (folder / "spiece.model").rename(folder / "tokenizer.json")
    assert "stage_1/tokenizer/tokenizer.json" in fetch(if_m(stage_2="none", noise_clip="none"))


def test_a_network_comes_when_it_is_needed(hub, cascade):
    loaded = if_m(variant="fp32").unet_1
    assert hub.asked == [f"{ONE}/unet/config.json", f"{ONE}/unet/diffusion_pytorch_model.safetensors"]
    assert loaded.config == cascade.unet_1.config


def test_a_gate_shows_before_anything_large(hub):
    hub.gated.add(IF_M["stage_1"])
    with pytest.raises(SourceError, match="IF-I-M-v1.0.*licence.*hf auth login.*HF_TOKEN"):
        fetch(if_m())
    assert hub.asked == []


def test_a_disk_that_is_too_small(hub, monkeypatch):
    def needed():
        with pytest.raises(CapacityError, match="has 1,000 bytes free.*need.*--to") as caught:
            fetch(if_m(noise_clip="none"))
        return int(re.search(r"need ([\d,]+)", str(caught.value))[1].replace(",", ""))

    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    names = [name for name in NEEDED if name.startswith("DeepFloyd")]
    assert needed() == sum((hub.root / name).stat().st_size for name in names)
    assert hub.asked == []
    (hub.cache / "models--DeepFloyd--IF-II-M-v1.0" / "blobs").mkdir(parents=True)
    (hub.cache / "models--DeepFloyd--IF-II-M-v1.0" / "blobs" / "ab.incomplete").write_bytes(bytes(500))
    hub.download(IF_M["stage_1"], names[0].split("/", 2)[2])
    assert needed() == sum((hub.root / name).stat().st_size for name in names[1:]) - 500


def test_a_machine_that_is_too_small_is_told_beforehand(hub, monkeypatch):
    monkeypatch.setattr(planning, "memory_of", lambda device: Memory(2 << 30, 2 << 30))
    with pytest.warns(UserWarning, match="stage I needs about .* GB.*smaller release.*bfloat16"):
        fetch(if_m())
    assert sorted(hub.asked) == NEEDED


def test_offline_names_what_is_missing(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="IF-I-M-v1.0.*HF_HUB_OFFLINE"):
        fetch(if_m())
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE"):
        fetch(if_m(), tmp_path / "to")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    shutil.rmtree(hub.root / IF_M["stage_1"] / "scheduler")  # which a release may lack
    fetch(if_m())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "stage_1/scheduler/scheduler_config.json" not in fetch(if_m())
    next(hub.cache.rglob("spiece.model")).unlink()
    with pytest.raises(SourceError, match="has no tokenizer/spiece.model.*HF_HUB_OFFLINE"):
        fetch(if_m())


def test_the_command(hub, tmp_path, capsys):
    words = ["download", "--model", "IF-M", "--stage-3", "none", "--device", "cpu", "--quiet"]
    assert main([*words, "--to", "here"]) == 0
    shown = capsys.readouterr()
    assert "here/stage_1/unet/config.json  " in shown.out
    assert "--model here" in shown.err
    assert main(["download", "--device", "cpu"]) == 0
    assert "nothing to fetch" in capsys.readouterr().err
    hub.gated.add(IF_M["stage_1"])
    assert main(words) == 2
    assert "licence" in capsys.readouterr().err
