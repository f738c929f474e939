"""The judge: its training tells shapes apart, the curator never marks its own homework, files load strictly."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from mtl_anagram.errors import ConfigError, InputError, SourceError, WeightsError
from mtl_anagram.models import Judge, load_judge
from training import train_judge
from training.train_judge import Plan, answers, curate, train

NAMES = ("bar", "block")
TINY = Plan(batch=16, pictures=960, styled=0.3, lr=4e-3)


def bars_and_blocks(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    ink = torch.zeros(count, 64, 64, dtype=torch.uint8)
    ink[::2, 30:34, 8:56] = 255
    ink[1::2, 20:44, 20:44] = 255
    return ink, torch.arange(count) % 2


def test_it_learns_and_is_read_back(one_thread, tmp_path) -> None:
    ink, labels = bars_and_blocks(8)
    judge = train(TINY, ink, ink, labels, NAMES)
    found = answers(judge, ink, ink)
    assert (found.argmax(1) == labels).all()
    assert torch.allclose(found.exp().sum(1), torch.ones(8), atol=1e-5)

    save_file(judge.state_dict(), tmp_path / "judge.safetensors")
    (tmp_path / "judge.json").write_text(json.dumps({"names": list(NAMES), "plan": {}}))
    again = load_judge(tmp_path)
    assert again.names == list(NAMES)
    picture = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(again(picture), judge(picture), atol=1e-5)
        large = torch.nn.functional.interpolate(picture, scale_factor=4, mode="nearest")
        assert torch.allclose(again(large), again(picture), atol=0.2)
    assert again.index(["block"]).tolist() == [1]
    with pytest.raises(InputError, match="'duck'.*bar, block"):
        again.index(["duck"])


def test_the_curator_asks_the_other_half(monkeypatch) -> None:
    ink, labels = bars_and_blocks(40)
    ink[:, 0, 0] = torch.arange(40, dtype=torch.uint8)  # each drawing says which it is
    trained: list[set[int]] = []
    asked: list[set[int]] = []

    def fake_train(plan, drawings_, shapes, labels_, names):
        trained.append(set(drawings_[:, 0, 0].tolist()))
        return None

    def fake_answers(judge, drawings_, shapes):
        asked.append(set(drawings_[:, 0, 0].tolist()))
        return torch.zeros(len(drawings_), 2).log_softmax(1)

    monkeypatch.setattr(train_judge, "train", fake_train)
    monkeypatch.setattr(train_judge, "answers", fake_answers)
    typical = curate(TINY, {"train": ink, "train_shapes": ink, "train_labels": labels}, NAMES)
    assert torch.allclose(typical, torch.full((40,), 0.5))
    assert all(not a & b for a, b in zip(trained, asked, strict=True))
    assert asked[0] | asked[1] == set(range(40))


@pytest.mark.parametrize("names", [None, [], "duck", [1]])
def test_damaged_names_are_refused(names, tmp_path) -> None:
    save_file(Judge(["a"]).state_dict(), tmp_path / "judge.safetensors")
    (tmp_path / "judge.json").write_text(json.dumps({"names": names}))
    with pytest.raises(ConfigError, match="names="):
        load_judge(tmp_path)


def test_other_weights_are_refused(tmp_path) -> None:
    with pytest.raises(SourceError, match="judge"):
        load_judge(tmp_path)
    save_file(Judge(["a"]).state_dict(), tmp_path / "judge.safetensors")
    (tmp_path / "judge.json").write_text(json.dumps({"names": ["a", "b"]}))
    with pytest.raises(WeightsError, match="misshapen"):
        load_judge(tmp_path)


def test_one_command_trains_one_thing(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["train_judge", "--data", "none", "--teacher", "--curate"])
    with pytest.raises(SystemExit):
        train_judge.main()
    assert "--curate: not allowed with argument --teacher" in capsys.readouterr().err
