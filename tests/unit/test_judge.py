"""The judge: its training tells shapes apart, files load strictly."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mtl_anagram.errors import ConfigError, InputError, SourceError, WeightsError
from mtl_anagram.models import Judge, load_judge
from training.train_judge import Plan, Trainer, answers

NAMES = ("bar", "block")
TINY = Plan(batch=16, pictures=960, cooldown=960, lr=4e-3)


def bars_and_blocks(count: int) -> dict[str, torch.Tensor]:
    ink = torch.zeros(count, 64, 64, dtype=torch.uint8)
    ink[::2, 30:34, 8:56] = 255
    ink[1::2, 20:44, 20:44] = 255
    labels = torch.arange(count) % 2
    return {"train": ink, "train_shapes": ink, "train_regions": ink // 255, "train_labels": labels}


def test_it_learns_and_is_read_back(tmp_path) -> None:
    data = bars_and_blocks(8)
    trainer = Trainer(TINY, data, NAMES, "train")
    while trainer.seen < TINY.pictures:
        trainer.train_step()
    judge = trainer.averaged()
    found = answers(judge, data, "train", torch.arange(8), 0)
    assert (found.argmax(1) == data["train_labels"]).all()
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
        rounded = load_judge(tmp_path, dtype="bfloat16")(picture).float()
        assert torch.allclose(rounded, judge(picture), atol=0.2)
    assert again.index(["block"]).tolist() == [1]
    with pytest.raises(InputError, match="'duck'.*bar, block"):
        again.index(["duck"])


def test_damaged_names_and_other_weights_are_refused(tmp_path) -> None:
    with pytest.raises(SourceError, match="judge"):
        load_judge(tmp_path)
    save_file(Judge(["a"]).state_dict(), tmp_path / "judge.safetensors")
    (tmp_path / "judge.json").write_text(json.dumps({"names": ["a", "b"]}))
    with pytest.raises(WeightsError, match="misshapen"):
        load_judge(tmp_path)
    for names in (None, [], "duck", [1]):
        (tmp_path / "judge.json").write_text(json.dumps({"names": names}))
        with pytest.raises(ConfigError, match="names"):
            load_judge(tmp_path)
