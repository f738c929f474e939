"""The trainings' common loop: options, which concepts, going on from a checkpoint, the log; and each command."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_anagram.models.tokenizers import CLIPTokenizer
from training import captions, checkpoints, drawings, export, loop, train_noise_clip, train_stage1


@dataclasses.dataclass(frozen=True)
class Plan:
    pictures: int = 1000
    lr: float = 0.5
    sizes: tuple[int, ...] = (2, 3)
    typical: float = 1.0


GIVEN = ("pictures", "lr", "sizes")


class Counter:
    """A training that counts."""

    MEASURES = ("value", "twice")

    def __init__(
        self, plan: Plan, data: dict, concepts: tuple[str, ...], typical: torch.Tensor | None
    ) -> None:
        self.plan, self.concepts, self.typical = plan, concepts, typical
        self.step, self.seen, self.seconds, self.began = 0, 0, 0.0, None

    def train_step(self) -> tuple[float, ...]:
        self.step, self.seen = self.step + 1, self.seen + 4
        return float(self.step), 2.0 * self.step

    def state(self) -> dict[str, Any]:
        plan = dataclasses.asdict(self.plan)
        return {"plan": plan, "step": self.step, "seconds": self.seconds, "concepts": self.concepts}

    def load(self, state: dict[str, Any]) -> None:
        self.step, self.seen, self.seconds = state["step"], 4 * state["step"], state["seconds"]

    def begin_from(self, folder: Path) -> None:
        self.began = folder


@pytest.fixture
def packed(monkeypatch) -> dict[str, torch.Tensor]:
    """Two drawings of every concept in each split."""
    labels = torch.arange(2 * len(drawings.CONCEPTS)) % len(drawings.CONCEPTS)
    ink = torch.zeros(len(labels), 64, 64, dtype=torch.uint8)
    ink[:, 20:44, 30:34] = 255
    parts = {"": ink, "_shapes": ink, "_regions": ink // 255, "_labels": labels}
    data = {f"{s}{kind}": value for s in ("train", "judge", "test") for kind, value in parts.items()}
    monkeypatch.setattr(drawings, "load", lambda *_: data)
    return data


def arguments(tmp_path: Path, *more: str) -> Any:
    parser = loop.options("words", Plan(), GIVEN, "nowhere")
    return parser.parse_args(["--data", "none", "--run", str(tmp_path / "run"), *more])


def test_labels_are_places_in_the_concepts_asked_for(packed) -> None:
    some = drawings.load_some("none", ("rabbit", "duck"), "none")
    labels = some["train_labels"]
    assert labels[0] == 1
    assert labels[1] == 0
    assert set(labels[2:42].tolist()) == {-1}
    rows = drawings.by_concept(labels, 2)
    assert [row.tolist() for row in rows] == [[1, 43], [0, 42]]
    assert packed["train_labels"][2] == 2  # what was loaded is as it was


def test_an_unknown_concept_is_named(packed) -> None:
    with pytest.raises(SystemExit, match=r"no drawings of unicorn.*duck, rabbit"):
        drawings.load_some("none", ("duck", "unicorn"), "none")


def test_options_have_the_types_of_the_plan(tmp_path) -> None:
    args = arguments(tmp_path, "--sizes", "4", "5", "--lr", "0.25")
    assert (args.sizes, args.lr, args.pictures) == ([4, 5], 0.25, None)
    with pytest.raises(SystemExit):
        arguments(tmp_path, "--sizes", "4")


def test_a_training_goes_on_where_it_was_and_ends_with_its_plan(packed, tmp_path) -> None:
    shown: list[int] = []
    args = arguments(tmp_path, "--pictures", "240", "--concepts", "duck", "whale", "--init", "folder")
    first = loop.begin(args, Plan(), GIVEN, Counter)
    assert first.began == Path("folder")
    assert first.concepts == ("duck", "whale")
    loop.go(first, args, lambda run: shown.append(first.seen), lambda: {"size": 7})
    assert (first.step, shown) == (60, [240])
    args = arguments(tmp_path, "--pictures", "600", "--sizes", "4", "5", "--init", "folder")
    second = loop.begin(args, Plan(), GIVEN, Counter)
    assert second.began is None
    assert second.step == 60
    assert second.concepts == ("duck", "whale")
    assert second.plan == Plan(pictures=600, sizes=(4, 5))
    loop.go(second, args, lambda run: {"score": 3})
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in log] == [50, 110, None]
    assert (log[0]["value"], log[0]["twice"], log[0]["size"], log[0]["pictures"]) == (25.5, 51.0, 7, 200)
    assert log[-1] == {"pictures": 600, "score": 3}
    state = checkpoints.load(tmp_path / "run")
    assert state is not None
    assert state["step"] == 150
    assert (tmp_path / "run/done").exists()


def test_no_minutes_train_nothing_and_keep_the_state(packed, tmp_path) -> None:
    args = arguments(tmp_path, "--minutes", "0")
    trainer = loop.begin(args, Plan(), GIVEN, Counter)
    loop.go(trainer, args, lambda run: None)
    assert trainer.step == 0
    assert checkpoints.load(tmp_path / "run") is not None


def test_sigterm_ends_it_with_a_checkpoint(packed, tmp_path) -> None:
    args = arguments(tmp_path, "--pictures", "4000")
    trainer = loop.begin(args, Plan(), GIVEN, Counter)

    def step() -> tuple[float, ...]:
        if trainer.step == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return Counter.train_step(trainer)

    trainer.train_step = step
    loop.go(trainer, args, lambda run: pytest.fail("there is no time to look"))
    assert checkpoints.load(tmp_path / "run")["step"] == 10
    assert not (tmp_path / "run/done").exists()


def test_pictures_are_counted_on_from_an_export_of_this_cascade(packed, tmp_path) -> None:
    folder = tmp_path / "weights/stage_1"
    folder.mkdir(parents=True)
    for name, expected in ((loop.CASCADE, 88), ("another", 0)):
        index = {"name": name, "training": {"stage_1": {"pictures": 88}}}
        (tmp_path / "weights/cascade.json").write_text(json.dumps(index))
        trainer = loop.begin(arguments(tmp_path, "--init", str(folder)), Plan(), GIVEN, Counter)
        assert (trainer.seen, trainer.step) == (expected, 0)


def test_the_commands_end_in_an_exported_cascade_of_their_concepts(packed, tmp_path, monkeypatch) -> None:
    """Stage I and the CLIP on two concepts, one step each, then the export, as the README of training says."""
    out, runs = tmp_path / "weights", tmp_path / "runs"
    (out / "stage_1/tokenizer").mkdir(parents=True)
    (out / "noise_clip").mkdir()
    (out / "stage_1/tokenizer/spiece.model").write_bytes(captions.train_sentencepiece(captions.corpus()))
    merges = captions.train_merges(captions.corpus())
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    (out / "noise_clip/merges.txt").write_text("#version: 0.2\n" + lines)
    assert CLIPTokenizer(out / "noise_clip/merges.txt").vocab_size > 256
    common = ["--data", "none", "--device", "cpu", "--concepts", "duck", "house plant", "--typical", "1"]

    def call(main: Any, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train", *words])
        main()

    small = ["--pictures", "4", "--batch", "4"]
    spiece = str(out / "stage_1/tokenizer/spiece.model")
    call(train_stage1.main, *common, *small, "--run", str(runs / "stage_1"), "--tokenizer", spiece)
    clip = ["--pictures", "8", "--batch", "8", "--run", str(runs / "noise_clip")]
    call(train_noise_clip.main, *common, *clip, "--merges", str(out / "noise_clip/merges.txt"))
    folders = [f"--{part.replace('_', '-')}={runs / part}" for part in export.EXPORTS]
    call(export.main, *folders, f"--judge={runs / 'judge'}", "--out", str(out))
    index = json.loads((out / "cascade.json").read_text())
    assert index["concepts"] == ["duck", "house plant"]
    assert index["training"]["stage_1"]["pictures"] == 4
    assert index["training"]["noise_clip"]["pictures"] == 8
    assert "noise_clip/clip_image_enc.safetensors" in index["files"]
