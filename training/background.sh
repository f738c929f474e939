#!/usr/bin/env bash
# Trains whatever is not finished, at low priority, without attention:
#   training/background.sh start DATA [CORES]   DATA: the drawings' folder, else MTL_ANAGRAM_DATA's; CORES: 1 unless given
#   training/background.sh status
#   training/background.sh stop            at the end of a step, with a checkpoint; kill -9 loses three minutes
#
# The parts take turns, so that whenever it ends each has got better; every second turn is stage I's. After each turn
# the averaged weights are exported to RUNS/export, a whole cascade at any time. A new checkout begins from training/weights, where
# an unfinished training was kept, else from weights/.
# Each part ends by itself; when all have, so does this. Two cores work at different parts, one mostly at stage I; with
# OMP_NUM_THREADS=2 and CORES=1 both work at one (stage I: 22 pictures a second instead of 12).
# RUNS (runs unless set) holds checkpoints and logs; TRAIN_OPTIONS goes to every training.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RUNS=${RUNS:-runs}
START=${START:-$([ -d training/weights ] && echo training/weights || echo weights)}
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=$PWD RUNS PYTHON START
# glibc keeps what is freed: mapping every large map anew takes up to half of the time.
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-2147483647}
PART=("$RUNS"/{stage_1,stage_2,judge,teacher,noise_clip})

groups() { cat "$RUNS/background.pid" 2>/dev/null | sed 's/^/-/'; }
alive() { for group in $(groups); do kill -0 -- "$group" 2>/dev/null && return; done; false; }

# turn PART MINUTES MODULE OPTION...: one stretch of a part that is neither done nor another core's, then an export.
turn() {
    local part=$1 minutes=$2 module=$3 own
    shift 3
    exec {own}>"$RUNS/$part.lock"
    if flock -n "$own" && [ ! -e "$RUNS/$part/done" ]; then
        worked=1
        echo "$(date -u +%H:%M) $part"
        # shellcheck disable=SC2086
        "$PYTHON" -m "training.$module" --data "$DATA" --cache "$RUNS/data" --run "$RUNS/$part" --minutes "$minutes" \
            --device cpu "$@" ${TRAIN_OPTIONS:-} &&
            flock "$RUNS/export.lock" "$PYTHON" -m training.export --stage-1 "$RUNS/stage_1" --stage-2 "$RUNS/stage_2" \
                --noise-clip "$RUNS/noise_clip" --judge "$RUNS/judge" --out "$RUNS/export" || sleep 60
    fi
    exec {own}>&-
}

stage_1() {
    turn stage_1 20 train_stage1 --init $START/stage_1 --batch 32 --lr 0.0007 --typical 0.3 \
        --tokenizer "$RUNS/export/stage_1/tokenizer/spiece.model"
}

all_turns() {
    DATA=$1
    exec {own}>"$RUNS/data.lock"
    flock "$own"
    if [ ! -d "$RUNS/export" ]; then
        cp -r "$START" "$RUNS/export.part"
        "$PYTHON" -m training.captions --out "$RUNS/export.part"
        mv "$RUNS/export.part" "$RUNS/export"
    fi
    [ -f "$RUNS/data/typical.pt" ] || "$PYTHON" -m training.curate --data "$DATA" --cache "$RUNS/data"
    exec {own}>&-
    until [ "$(ls -d "${PART[@]/%//done}" 2>/dev/null | wc -l)" = "${#PART[@]}" ]; do
        worked=0
        stage_1
        turn stage_2 12 train_stage2 --init $START/stage_2 --pictures 200000 --cooldown 60000 --whole 4000
        stage_1
        turn judge 6 train_judge --init $START/judge
        stage_1
        turn teacher 6 train_judge --teacher
        stage_1
        # The teacher is asked once it has learnt.
        turn noise_clip 8 train_noise_clip --init $START/noise_clip --merges "$RUNS/export/noise_clip/merges.txt" \
            --pictures 1520000 --cooldown 620000 --typical 1 --clear 0.35 \
            $([ -e "$RUNS/teacher/done" ] && echo --teacher "$RUNS/teacher" --taught 0.7)
        [ "$worked" = 1 ] || sleep 5
    done
}

case ${1:-} in
start)
    DATA=$(realpath -- "${2:-${MTL_ANAGRAM_DATA:?the folder of the drawings: as the second word, or in MTL_ANAGRAM_DATA}}")
    if alive; then echo "it runs already" >&2; exit 1; fi
    mkdir -p "$RUNS"
    : >"$RUNS/background.pid"
    for ((core = 0; core < ${3:-1}; core++)); do
        setsid nohup nice -n 19 bash "$0" turns "$DATA" >>"$RUNS/background.log" 2>&1 </dev/null &
        echo $! >>"$RUNS/background.pid"
    done
    ;;
turns) all_turns "$2" ;;
stop)
    # shellcheck disable=SC2046
    if alive; then kill -- $(groups) || true; fi
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
