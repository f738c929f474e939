"""Plans and the commands info and download: what they say of folders, hubs and machines."""

import json
import shutil

import pytest
from huggingface_hub import constants

import mtl_anagram.download as downloading
import mtl_anagram.planning as planning
from mtl_anagram import Cascade, InputError, SourceError
from mtl_anagram.cli import main
from mtl_anagram.cli_models import describe
from mtl_anagram.memory import Machine
from mtl_anagram.models import load_unet
from mtl_anagram.models.t5 import T5Encoder
from mtl_anagram.planning import FITS, OVERHEAD, TIGHT, TOO_LARGE, UNKNOWN

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def plan(cascade_folder):
    return Cascade.from_pretrained(cascade_folder, device="cpu").plan(size=16)


def test_a_folders_plan_is_what_its_files_hold(plan, cascade_folder):
    networks = {network.name: network for network in plan.networks}
    assert list(networks) == ["text_encoder", "unet_1", "unet_2", "noise_clip"]
    unet = load_unet(cascade_folder / "stage_1")
    count = sum(parameter.numel() for parameter in unet.parameters())
    assert networks["unet_1"].parameters == count
    assert networks["unet_1"].memory == 4 * count
    weights = cascade_folder / "stage_1" / "unet" / "diffusion_pytorch_model.safetensors"
    assert networks["unet_1"].disk == weights.stat().st_size
    assert networks["unet_1"].config == unet.config
    assert all(file.present and file.bytes for network in plan.networks for file in network.files)
    for stage in plan.stages:
        assert stage.weights == sum(networks[name].memory for name in stage.networks)
        assert stage.needed == OVERHEAD["cpu"] + stage.weights + stage.activations
    largest = max(stage.activations for stage in plan.stages)
    assert plan.together == OVERHEAD["cpu"] + sum(n.memory for n in plan.networks) + largest


def test_both_copies_of_the_embedding_count_once(cascade_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(cascade_folder, tmp_path / "own")
    path = folder / "stage_1" / "text_encoder" / "model.safetensors"
    state = load_file(path)
    state["encoder.embed_tokens.weight"] = state["shared.weight"].clone()
    save_file(state, path)
    cascade = Cascade.from_pretrained(folder, device="cpu")
    network = planning.plan_network(cascade, "text_encoder")
    assert network.parameters == sum(p.numel() for p in T5Encoder(network.config).parameters())


def test_dtypes_change_what_memory_the_weights_take(cascade_folder):
    """T5 is kept out of float16, and the noise-aware CLIP in float32."""

    def weights(dtype):
        cascade = Cascade.from_pretrained(cascade_folder, device="cpu", dtype=dtype)
        names = ("text_encoder", "unet_1", "noise_clip")
        return [planning.plan_network(cascade, name).memory for name in names]

    single, half = weights("float32"), weights("float16")
    assert half == [single[0] // 2, single[1] // 2, single[2]]


@pytest.mark.parametrize(
    "total, free, verdict",
    [(1 << 40, 1 << 40, FITS), (1 << 40, 1000, TIGHT), (1000, 1000, TOO_LARGE), (None, None, UNKNOWN)],
)
def test_verdicts(cascade_folder, monkeypatch, total, free, verdict):
    found = None if total is None else Machine("cpu", total, free)
    monkeypatch.setattr(planning, "machine_of", lambda device: found)
    plan = Cascade.from_pretrained(cascade_folder, device="cpu").plan(size=16)
    assert {stage.verdict for stage in plan.stages} == {verdict}
    assert plan.keep == ("all" if verdict == FITS else "one")


def test_a_hub_id_that_is_no_release_is_unknown_until_it_is_asked(tmp_path, monkeypatch, cascade_folder):
    import huggingface_hub

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    asked = []

    def fetch(repo_id, name, subfolder=None):
        asked.append(f"{subfolder}/{name}")
        return str(cascade_folder / "stage_1" / subfolder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    cascade = Cascade.from_pretrained("owner/model", device="cpu")
    unknown = cascade.plan(look_up=False)
    assert asked == []
    assert {stage.verdict for stage in unknown.stages} == {UNKNOWN}
    assert not cascade.keeps_all
    known = cascade.plan(size=16)
    assert sorted(asked) == ["text_encoder/config.json", "unet/config.json"]
    assert [network.parameters for network in known.networks] == [
        network.parameters
        for network in Cascade.from_pretrained(cascade_folder, device="cpu").plan(size=16).networks
        if network.name in ("text_encoder", "unet_1")
    ]
    assert {stage.verdict for stage in known.stages} == {FITS}


@pytest.mark.parametrize("changes", [{"views": 0}, {"batch_size": 0}, {"views": "2"}])
def test_wrong_numbers(cascade_folder, changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        Cascade.from_pretrained(cascade_folder, device="cpu").plan(**changes)


def test_info(cascade_folder, capsys):
    assert main(["info", "--model", str(cascade_folder), "--device", "cpu", "--size", "16"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("tiny, float32 on cpu\n")
    for word in ("text_encoder", "unet_1", "unet_2", "noise_clip", "stage II", "this machine", "fits", "all"):
        assert word in shown
    assert "all networks stay in memory (keep=all)" in shown


def test_info_as_json(cascade_folder, capsys, plan):
    assert main(["info", "--model", str(cascade_folder), "--device", "cpu", "--size", "16", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    expected = json.loads(json.dumps(plan.to_dict()))
    content.pop("machine"), expected.pop("machine")
    assert content == expected
    assert content["networks"][1]["config"]["_class_name"] == "UNet2DConditionModel"


def test_info_of_the_embedded_cascade_names_the_releases(capsys):
    assert main(["info", "--device", "cpu", "--size", "64"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("embedded-v4, float32 on cpu")
    assert "releases by name: IF-M, IF-L, IF-XL" in shown


def test_info_of_what_is_no_model(capsys):
    assert main(["info", "--model", "IF-S"]) == 2
    assert "Releases known by name: IF-M, IF-L, IF-XL" in capsys.readouterr().err


def test_unknown_numbers_are_question_marks(plan):
    import dataclasses

    stages = [dataclasses.replace(stage, weights=None, needed=None, verdict=UNKNOWN) for stage in plan.stages]
    networks = [dataclasses.replace(n, parameters=None, disk=None, memory=None) for n in plan.networks]
    text = "\n".join(
        describe(dataclasses.replace(plan, networks=networks, stages=stages, machine=None, together=None))
    )
    assert " ? " in text
    assert "this machine (" not in text


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """What the command asks of download(), which fetches nothing here."""
    seen = {}

    def stand_in(cascade, to, *, progress):
        seen.update(cascade=cascade, to=to, progress=progress)
        return [downloading.Fetched("stage_1", tmp_path / "a.safetensors", 1_500_000_000, True)] if to else []

    monkeypatch.setattr(downloading, "download", stand_in)
    monkeypatch.chdir(tmp_path)
    return seen


def test_download(fetched, tmp_path, capsys):
    words = [
        "download",
        "--model",
        "IF-XL",
        "--stage-2",
        "IF-M",
        "--variant",
        "fp32",
        "--to",
        "here",
        "--quiet",
    ]
    assert main([*words, "--device", "cpu", "--keep", "one", "--ignore-memory"]) == 0
    cascade = fetched["cascade"]
    assert cascade.sources["stage_2"] == "DeepFloyd/IF-II-M-v1.0"
    assert (cascade.variant, cascade.keep, cascade.ignore_memory) == (None, "one", True)
    assert (fetched["to"], fetched["progress"]) == ("here", False)
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'a.safetensors'}  1.5 GB\n"
    assert "1 files, 1.5 GB; from now on it works offline" in shown.err
    assert "--model here" in shown.err
    assert main(["download", "--device", "cpu"]) == 0
    assert fetched["progress"]
    assert "nothing to fetch" in capsys.readouterr().err


def test_a_refusal_is_one_line_and_a_status(fetched, monkeypatch, capsys):
    def refuse(*_, **__):
        raise SourceError("owner/model is gated:\naccept its licence")

    monkeypatch.setattr(downloading, "download", refuse)
    assert main(["download", "--model", "IF-M", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "mtl-anagram: error: owner/model is gated: accept its licence\n"
