#!/usr/bin/env bash
# Trains whatever is not finished, on one core at low priority, without attention:
#   training/background.sh start DATA      DATA: the drawings' folder; or the environment variable MTL_ANAGRAM_DATA
#   training/background.sh status
#   training/background.sh stop            at the end of a step, with a checkpoint; kill -9 loses three minutes
#
# The parts take turns, so that whenever it ends each has got better; every second turn is stage I's. After each turn
# the averaged weights are exported to RUNS/export, a whole cascade at any time. A new checkout begins from training/weights, where
# an unfinished training was kept, else from weights/.
# Each part ends by itself; when all have, so does this.
# RUNS (runs unless set) holds checkpoints and logs; TRAIN_OPTIONS goes to every training.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RUNS=${RUNS:-runs}
START=${START:-$([ -d training/weights ] && echo training/weights || echo weights)}
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=1 PYTHONPATH=$PWD RUNS PYTHON START
PART=("$RUNS"/{stage_1,stage_2,judge,teacher,noise_clip})

alive() { [ -f "$RUNS/background.pid" ] && kill -0 -- "-$(cat "$RUNS/background.pid")" 2>/dev/null; }

# turn PART MINUTES MODULE OPTION...: one stretch of a part that is not done, then an export.
turn() {
    local part=$1 minutes=$2 module=$3
    shift 3
    [ -e "$RUNS/$part/done" ] && return
    echo "$(date -u +%H:%M) $part"
    # shellcheck disable=SC2086
    "$PYTHON" -m "training.$module" --data "$DATA" --cache "$RUNS/data" --run "$RUNS/$part" --minutes "$minutes" \
        --device cpu "$@" ${TRAIN_OPTIONS:-} &&
        "$PYTHON" -m training.export --stage-1 "$RUNS/stage_1" --stage-2 "$RUNS/stage_2" \
            --noise-clip "$RUNS/noise_clip" --judge "$RUNS/judge" --out "$RUNS/export" || sleep 60
}

stage_1() {
    turn stage_1 20 train_stage1 --init $START/stage_1 --batch 32 --lr 0.0007 --typical 0.3 \
        --tokenizer "$RUNS/export/stage_1/tokenizer/spiece.model"
}

all_turns() {
    DATA=$1
    if [ ! -d "$RUNS/export" ]; then
        cp -r "$START" "$RUNS/export.part"
        "$PYTHON" -m training.captions --out "$RUNS/export.part"
        mv "$RUNS/export.part" "$RUNS/export"
    fi
    [ -f "$RUNS/data/typical.pt" ] || "$PYTHON" -m training.curate --data "$DATA" --cache "$RUNS/data"
    until [ "$(ls -d "${PART[@]/%//done}" 2>/dev/null | wc -l)" = "${#PART[@]}" ]; do
        stage_1
        turn stage_2 12 train_stage2 --init $START/stage_2
        stage_1
        turn judge 6 train_judge --init $START/judge
        stage_1
        turn teacher 6 train_judge --teacher
        stage_1
        # The teacher is asked once it has learnt.
        turn noise_clip 8 train_noise_clip --init $START/noise_clip --merges "$RUNS/export/noise_clip/merges.txt" \
            $([ -e "$RUNS/teacher/done" ] && echo --teacher "$RUNS/teacher" --taught 0.7)
    done
}

case ${1:-} in
start)
    DATA=$(realpath -- "${2:-${MTL_ANAGRAM_DATA:?the folder of the drawings: as the second word, or in MTL_ANAGRAM_DATA}}")
    if alive; then echo "it runs already" >&2; exit 1; fi
    mkdir -p "$RUNS"
    setsid nohup nice -n 19 bash "$0" turns "$DATA" >>"$RUNS/background.log" 2>&1 </dev/null &
    echo $! >"$RUNS/background.pid"
    ;;
turns) all_turns "$2" ;;
stop)
    if alive; then kill -- "-$(cat "$RUNS/background.pid")"; fi
    while alive; do sleep 1; done
    ;;
status)
    if alive; then echo "running"; else echo "not running"; fi
    for part in "${PART[@]}"; do
        [ -f "$part/log.jsonl" ] && echo "$part: $([ -e "$part/done" ] && echo done,) $(tail -n 1 "$part/log.jsonl")"
    done
    ;;
*) sed -n '2,/^set/{/^#/p}' "$0"; exit 2 ;;
esac
