"""batch(): many requests from a file, by one process or several; kills, full disks, damage and failures."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from mtl_anagram import Cascade, InputError, Recipe, SourceError, generate_anagram
from mtl_anagram.evaluation.batch import batch
from mtl_anagram.files.claims import Claims
from tests.unit.processes import on_tiny, start, status, until
from tests.unit.tiny_requests import files, never, pixels

TINY = {"size": 8, "stop_after": 8, "num_inference_steps": 2}
DUCK = {"prompts": ["a duck", "a rabbit"], "views": ["identity", "flip"]}
CAT = {"prompts": ["a cat", "a [sea] view"], "views": ["rotate_180", "negate"]}
FIRST = {"name": "one", **DUCK, "seed": [0, 3], **TINY}
SECOND = {"name": "two", **CAT, "seed": 1, **TINY}
HYBRIDS = [{**FIRST, "name": name, "views": ["low_pass", "high_pass"]} for name in ("far", "near")]
OTHER = {**SECOND, "name": "other one", "style": "a sketch of", "recipe": "plain", "stop_after": 32}


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def manifest(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def made_by(folder):
    """A batch's pictures and its manifest."""
    return {name: data for name, data in files(folder).items() if name.endswith((".png", "manifest.jsonl"))}


@pytest.fixture
def small(cascade, tmp_path):
    """A file of ten small requests, and what an undisturbed batch makes of it."""
    lines = [{**(FIRST, SECOND)[i % 2], "name": f"number {i}", "seed": [i, i + 1]} for i in range(10)]
    path = write(tmp_path / "requests.jsonl", *lines)
    batch(path, tmp_path / "undisturbed", model=cascade, batch_size=3)
    return path, made_by(tmp_path / "undisturbed")


@pytest.fixture
def in_a_child(cascade_folder):
    """batch(...) with the tiny cascade in a process that can be killed."""
    return partial(start, on_tiny, batch, cascade_folder)


def test_requests_share_batches_and_each_is_what_it_would_be_alone(cascade, tmp_path, monkeypatch):
    rows = []
    hook = cascade.unet_1.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    path = write(tmp_path / "requests.jsonl", FIRST, OTHER, SECOND, *HYBRIDS)
    lines = batch(path, tmp_path / "out", model=cascade)
    hook.remove()
    assert max(rows) == 3 * 2 * 2  # three pictures of two requests with two views, guided
    wanted = [("one", 0), ("one", 3), ("other one", 1), ("two", 1)]
    wanted += [("far", 0), ("far", 3), ("near", 0), ("near", 3)]
    assert [(line["name"], line["seed"]) for line in lines] == wanted
    assert {line["status"] for line in lines} == {"done"}
    assert lines == manifest(tmp_path / "out")
    for request in (FIRST, OTHER, SECOND, *HYBRIDS):
        recipe = Recipe.plain() if request is OTHER else None
        own = {**request, "style": request.get("style", ""), "recipe": recipe}
        folder = tmp_path / "alone" / own.pop("name")
        generate_anagram(**own, save_dir=folder, model=cascade)
        (folder / "seeds.png").unlink(missing_ok=True)  # a batch makes no sheet of seeds
        for name, content in files(folder).items():
            other = (tmp_path / "out" / folder.name / name).read_bytes()
            if name.endswith(".png"):
                assert (pixels(content) - pixels(other)).abs().max() <= 1
            else:
                assert json.loads(content)["request"] == json.loads(other)["request"]
    before = files(tmp_path / "out")
    monkeypatch.setattr(Cascade, "encode", never)
    assert batch(path, tmp_path / "out", model=cascade) == lines  # nothing is left to be done
    assert files(tmp_path / "out") == before


BAD = [
    ("no json", "no JSON object"),
    ({"name": "a/b"}, "name='a/b' must be"),
    ({"name": "more", "colour": 3}, "colour: unknown"),
    ({"name": "more", "views": ["identity"]}, "2 prompts for 1 views"),
    ({"name": "more", "prompts": None}, "prompts and views are needed"),
    ({"name": "more", "recipe": {"horizons": 3}}, "did you mean 'horizon'"),
    ({"name": "ONE"}, "another line's"),
    ({"name": "more", "seed": -1}, "seed=-1"),
    ({"name": "more", "size": 9}, "size=9"),
]


def test_all_lines_are_checked_before_anything_is_sampled(cascade, tmp_path, monkeypatch):
    monkeypatch.setattr(Cascade, "encode", never)
    lines = [FIRST, *({**FIRST, **line} if isinstance(line, dict) else line for line, _ in BAD)]
    path = write(tmp_path / "requests.jsonl", *lines)
    with pytest.raises(InputError) as caught:
        batch(path, tmp_path / "out", model=cascade)
    for number, (_, said) in enumerate(BAD, start=2):
        assert f"line {number}: " in str(caught.value)
        assert said in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no request"):
        batch(write(tmp_path / "none.jsonl"), tmp_path / "out", model=cascade)
    with pytest.raises(SourceError, match=r"nothing\.jsonl"):
        batch(tmp_path / "nothing.jsonl", tmp_path / "out", model=cascade)


def test_a_request_that_fails_fails_alone_and_is_tried_again(cascade, tmp_path, monkeypatch):
    path = write(tmp_path / "requests.jsonl", FIRST, SECOND)
    encode = Cascade.encode

    def overflow(self, prompts):
        text, null = encode(self, prompts)
        return text * (float("inf") if "a cat" in prompts else 1), null

    monkeypatch.setattr(Cascade, "encode", overflow)
    lines = {(line["name"], line["seed"]): line for line in batch(path, tmp_path / "out", model=cascade)}
    assert "not finite" in lines.pop(("two", 1))["error"]
    assert {line["status"] for line in lines.values()} == {"done"}
    monkeypatch.undo()
    assert {line["status"] for line in batch(path, tmp_path / "out", model=cascade)} == {"done"}
    assert len(manifest(tmp_path / "out")) == 3


def test_fifty_kills(cascade, in_a_child, small, tmp_path):
    """Each picture once in the manifest, every file whole, and the same as without kills."""
    (path, undisturbed), out, draw = small, tmp_path / "out", random.Random(0)
    kills, began = 0, time.monotonic()
    while kills < 50:
        child = in_a_child(path, out, batch_size=3)
        child.join(draw.uniform(0.02, 0.4))
        if child.is_alive():
            child.kill()
            kills += 1
        status(child)
        if (out / "manifest.jsonl").is_file():
            lines = manifest(out)  # whole at any time
            assert len({(line["name"], line["seed"]) for line in lines}) == len(lines)
            if len(lines) == 20:
                shutil.rmtree(out)
        assert time.monotonic() - began < 300
    batch(path, out, model=cascade, batch_size=3)
    assert made_by(out) == undisturbed
    assert not [name for name in files(out) if name.endswith((".part", ".begun"))]


def test_two_runs_into_one_folder_and_one_that_is_killed(in_a_child, small, tmp_path):
    (path, undisturbed), out = small, tmp_path / "out"
    children = [in_a_child(path, out, batch_size=3) for _ in range(3)]
    time.sleep(0.3)
    children[0].kill()
    assert [status(child) for child in children][1:] == [0, 0]
    assert made_by(out) == undisturbed


def test_damage_is_found_said_and_made_again(cascade, small, tmp_path, caplog):
    (path, undisturbed), out = small, tmp_path / "undisturbed"
    (out / "number 3/0003/sample_8.png").write_bytes(b"not a picture")
    (out / "number 4/0005/metadata.json").write_text("{")
    (out / "number 5/0006/metadata.json").unlink()
    batch(path, out, model=cascade, batch_size=3)
    assert "number 3/0003" in caplog.text
    assert "number 4/0005" in caplog.text
    assert made_by(out) == undisturbed


def full():
    """No file may be longer than this, as on a disk that has no more room."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))


def test_a_full_disk_and_a_read_only_folder_lose_nothing(cascade, in_a_child, small, tmp_path, monkeypatch):
    (path, undisturbed), out = small, tmp_path / "out"
    assert status(in_a_child(path, out, batch_size=3, before=full)) == 1
    assert not [name for name in files(out) if name.endswith(".part")]
    batch(path, out, model=cascade, batch_size=3)
    assert made_by(out) == undisturbed
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SourceError, match="cannot be written to"):
        batch(path, out, model=cascade)
    assert made_by(out) == undisturbed


def deadly(restart):
    """A cat kills its process, which torchrun's agent has started again so many times."""
    os.environ["TORCHELASTIC_RESTART_COUNT"], encode = str(restart), Cascade.encode

    def kill(self, prompts):
        if "a cat" in prompts:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(self, prompts)

    Cascade.encode = kill


def test_what_kills_its_worker_twice_is_set_aside(in_a_child, tmp_path):
    """As torchrun's agent restarts its workers: first the batch dies, then each picture has a try of its own."""
    path = write(tmp_path / "requests.jsonl", FIRST, SECOND)
    for restart, found in enumerate((-signal.SIGKILL, -signal.SIGKILL, 0)):
        assert status(in_a_child(path, tmp_path / "out", before=partial(deadly, restart))) == found
    found = {(line["name"], line["seed"]): line["status"] for line in manifest(tmp_path / "out")}
    assert found == {("one", 0): "done", ("one", 3): "done", ("two", 1): "failed"}


def hold(folder):
    for name in Claims(folder).share(["a", "b"], lambda name: False):
        (folder / f"{name}.held").touch()
        time.sleep(60)


def test_claims_go_when_their_process_ends(tmp_path):
    child = start(hold, tmp_path)
    until((tmp_path / "a.held").exists)
    others = Claims(tmp_path).share(["a", "b"], lambda name: False)
    assert next(others) == "b"
    child.kill()
    status(child)
    assert list(others) == ["a"]


def test_a_schedulers_notice(cascade_folder, cascade, small, tmp_path):
    """SIGTERM: the batch under way is dropped, nothing is left behind, and the same command goes on."""
    (path, undisturbed), out = small, tmp_path / "out"
    command = [sys.executable, "-m", "mtl_anagram", "batch", str(path), "--out", str(out), "--device", "cpu"]
    command += ["--model", str(cascade_folder), "--batch-size", "3"]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        until(lambda: process.poll() is not None or ((out / "manifest.jsonl").is_file() and manifest(out)))
        process.terminate()
        assert process.wait(10) == 143
    assert not [name for name in files(out) if name.endswith((".part", ".begun"))]
    batch(path, out, model=cascade, batch_size=3)
    assert made_by(out) == undisturbed


def test_torchrun(cascade_folder, small, tmp_path):
    path, undisturbed = small
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "mtl_anagram", "batch", str(path), "--out", str(tmp_path / "out"), "--device", "cpu"]
    command += ["--model", str(cascade_folder), "--batch-size", "3"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert made_by(tmp_path / "out") == undisturbed


def test_a_picture_with_another_requests_folder_is_refused_before_any_work(cascade, tmp_path, monkeypatch):
    batch(write(tmp_path / "requests.jsonl", FIRST, SECOND), tmp_path / "out", model=cascade)
    monkeypatch.setattr(Cascade, "encode", never)
    other, said = {"style": "a painting of"}, r".* holds another request's pictures .*style.*"
    changed = write(tmp_path / "changed.jsonl", {**FIRST, **other}, {**SECOND, **other})
    with pytest.raises(InputError, match=f"{FIRST['name']}/{said}; .* delete .*{SECOND['name']}/{said}"):
        batch(changed, tmp_path / "out", model=cascade)
