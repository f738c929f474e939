"""Write trained weights as the embedded cascade: float16 safetensors in the published layout, checksums."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from mtl_anagram.files.atomic import write_atomically
from training import checkpoints, drawings, loop, styles, train_stage1, train_stage2

# The published schedulers' settings, but for two. Stage I's sample_max_value is 1.5: that dynamic threshold divides a
# picture whose guided ink goes beyond black by up to 1.5, paper included: white is drawn as light grey. Stage II's
# variance is the learned one: on what a short training has learnt of it, a step leaves grain in flat colours.
SCHEDULER = {
    "_class_name": "DDPMScheduler", "beta_end": 0.02, "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 0.0001, "clip_sample": True, "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.95,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "sample_max_value": 1.0, "thresholding": True, "trained_betas": None,
    "variance_type": "learned_range",
}  # fmt: skip
SCHEDULER_2 = {**SCHEDULER, "variance_type": "fixed_small"}


def as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def half(state: dict[str, Tensor]) -> bytes:
    """A state dict as a float16 safetensors file; SystemExit where a number does not fit."""
    for name, tensor in state.items():
        if not torch.isfinite(tensor.half()).all():
            raise SystemExit(f"{name} is not finite in float16: this checkpoint cannot be exported")
    return to_safetensors(
        {name: tensor.half().contiguous() for name, tensor in state.items()}, {"format": "pt"}
    )


def plan_of(kind: type, settings: dict[str, Any]) -> Any:
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()})


def export_stage1(state: dict[str, Any], out: Path) -> None:
    """The averaged weights of the UNet and the text encoder, their configs and the scheduler's settings."""
    model = train_stage1.Model(plan_of(train_stage1.Plan, state["plan"]))
    model.load_state_dict(state["ema"])
    write_atomically(out / "stage_1/unet/config.json", as_json(model.unet.config.to_dict()))
    write_atomically(out / "stage_1/unet/diffusion_pytorch_model.safetensors", half(model.unet.state_dict()))
    write_atomically(out / "stage_1/text_encoder/config.json", as_json(model.t5.config.to_dict()))
    write_atomically(out / "stage_1/text_encoder/model.safetensors", half(model.t5.state_dict()))
    write_atomically(out / "stage_1/scheduler/scheduler_config.json", as_json(SCHEDULER))


def export_stage2(state: dict[str, Any], out: Path) -> None:
    """The averaged weights of stage II's UNet, its config and the scheduler's settings; the text is stage I's."""
    unet = train_stage2.network(plan_of(train_stage2.Plan, state["plan"]))
    unet.load_state_dict(state["ema"])
    write_atomically(out / "stage_2/unet/config.json", as_json(unet.config.to_dict()))
    write_atomically(out / "stage_2/unet/diffusion_pytorch_model.safetensors", half(unet.state_dict()))
    write_atomically(out / "stage_2/scheduler/scheduler_config.json", as_json(SCHEDULER_2))


def export_noise_clip(state: dict[str, Any], out: Path) -> None:
    """Both towers; the byte-pair merges lie there already."""
    towers: dict[str, dict[str, Tensor]] = {"image": {}, "text": {}}
    for name, tensor in state["model"].items():
        tower, _, rest = name.partition(".")
        towers[tower][rest] = tensor
    write_atomically(out / "noise_clip/clip_image_enc.safetensors", half(towers["image"]))
    write_atomically(out / "noise_clip/clip_text_enc.safetensors", half(towers["text"]))


def training_facts(states: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What cascade.json says about the training of each part: pictures seen, minutes, seeds."""
    facts: dict[str, Any] = {}
    for part, state in states.items():
        plan = state["plan"]
        facts[part] = {
            "pictures": state["seen"],
            "steps": state["step"], "minutes": round(state["seconds"] / 60, 1), "seed": plan["seed"],
        }  # fmt: skip
    return facts


def write_index(out: Path, concepts: dict[str, list[str]], facts: dict[str, Any]) -> None:
    """cascade.json: name, concepts, styles, training, every file's SHA-256.

    concepts: by part, what it has learnt. What an older index says of a part that is not exported now, and its
    recipe, stay.
    """
    old: dict[str, Any] = {}
    if (out / "cascade.json").is_file():
        old = json.loads((out / "cascade.json").read_text(encoding="utf-8"))
    files = {
        file.relative_to(out).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("*"))
        if file.is_file()
        and file.suffix in (".json", ".safetensors", ".model", ".txt")
        and file.name != "cascade.json"
    }
    drawn = concepts.get("stage_1") or old.get("concepts") or list(drawings.DRAWN)
    told_apart = concepts.get("noise_clip") or old.get("clip_concepts") or drawn
    index = {
        "name": loop.CASCADE, "concepts": drawn, "clip_concepts": told_apart,
        "styles": [style for style in styles.STYLES if style],
        "training": {**old.get("training", {}), **facts}, "files": files,
    }  # fmt: skip
    if "recipe" in old:
        index["recipe"] = old["recipe"]
    write_atomically(out / "cascade.json", as_json(index))


def export_judge(run: Path, out: Path) -> None:
    """The judge as the end of its last stretch wrote it."""
    for name in ("judge.safetensors", "judge.json"):
        if (run / name).is_file():
            write_atomically(out / "judge" / name, (run / name).read_bytes())


EXPORTS = {"stage_1": export_stage1, "stage_2": export_stage2, "noise_clip": export_noise_clip}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for part in EXPORTS:
        parser.add_argument(
            f"--{part.replace('_', '-')}", default=f"runs/{part}", help="that training's folder"
        )
    parser.add_argument("--judge", default="runs/judge", help="that training's folder")
    parser.add_argument("--out", default="weights", help="the cascade's folder, with both tokenizers in it")
    args = parser.parse_args()
    out = Path(args.out)
    for file in ("stage_1/tokenizer/spiece.model", "noise_clip/merges.txt"):
        if not (out / file).is_file():
            raise SystemExit(f"{out / file} is missing: run python -m training.captions --out {out} first")
    states = {}
    for part, export in EXPORTS.items():
        state = checkpoints.load(Path(getattr(args, part)))
        if state is None:
            print(f"no checkpoint in {getattr(args, part)}: {part} is left as it is")
            continue
        export(state, out)
        states[part] = state
    export_judge(Path(args.judge), out)
    concepts = {part: list(state["concepts"]) for part, state in states.items()}
    facts = training_facts(states)
    write_index(out, concepts, facts)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {size / 1e6:.2f} MB; {json.dumps(facts)}")


if __name__ == "__main__":
    main()
