#!/usr/bin/env bash
# Ten minutes of a GPU: stage I goes on from its checkpoint, or from the exported weights, at a batch that fills the card.
#   training/gpu.sh DATA                   DATA: the drawings' folder; or the environment variable MTL_ANAGRAM_DATA
# Then exports to RUNS/export and prints pictures a second. DEVICE=cpu rehearses it; MINUTES, TRAIN_OPTIONS change it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RUNS=${RUNS:-runs}
PYTHON=${PYTHON:-python}
START=${START:-$([ -d training/weights ] && echo training/weights || echo weights)}
DATA=${1:-${MTL_ANAGRAM_DATA:?the folder of the drawings: as the first word, or in MTL_ANAGRAM_DATA}}
export PYTHONPATH=$PWD
DEVICE=${DEVICE:-cuda}
# A picture takes about 40 MB of the card; the learning rate rises with the root of the batch.
read -r BATCH LR < <("$PYTHON" -c "
import torch
memory = torch.cuda.get_device_properties(0).total_memory if '$DEVICE' == 'cuda' else 2**31
batch = min(1024, max(32, int(0.8 * memory / 40e6) // 32 * 32))
print(batch, 7e-4 * min(3.0, (batch / 32) ** 0.5))")
if [ ! -d "$RUNS/export" ]; then
    mkdir -p "$RUNS"
    cp -r "$START" "$RUNS/export"
    "$PYTHON" -m training.captions --out "$RUNS/export"
fi
[ -f "$RUNS/data/typical.pt" ] || "$PYTHON" -m training.curate --data "$DATA" --cache "$RUNS/data"
# shellcheck disable=SC2086
"$PYTHON" -m training.train_stage1 --data "$DATA" --cache "$RUNS/data" --run "$RUNS/stage_1" --device "$DEVICE" \
    --init $START/stage_1 --tokenizer "$RUNS/export/stage_1/tokenizer/spiece.model" --minutes "${MINUTES:-10}" \
    --batch "$BATCH" --lr "$LR" ${TRAIN_OPTIONS:-}
"$PYTHON" -m training.export --stage-1 "$RUNS/stage_1" --stage-2 "$RUNS/stage_2" --noise-clip "$RUNS/noise_clip" \
    --judge "$RUNS/judge" --out "$RUNS/export"
"$PYTHON" -c "
import json
lines = [json.loads(line) for line in open('$RUNS/stage_1/log.jsonl')]
print('pictures a second:', [line['per_second'] for line in lines if 'per_second' in line][-1:])"
