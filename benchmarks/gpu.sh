#!/usr/bin/env bash
# Six minutes of a GPU: its rates, the GPU tests, and steps at the sizes of IF-I-XL and IF-II-L, ours and the peer.
#   bash benchmarks/gpu.sh > gpu.md            each part has its limit of time; a part that fails does not stop the others
#   bash benchmarks/gpu.sh --tiny              a rehearsal on a CPU
set -uo pipefail
cd "$(dirname "$0")/.."
part() {
    local limit=$1 title=$2
    shift 2
    echo; echo "## $title"; echo; echo "\`python -m $*\`"; echo
    timeout "$limit" python -m "$@" 2>&1 || echo "(ended with status $? after at most $limit s)"
}
if [ "${1:-}" = --tiny ]; then
    part 60 "The machine" benchmarks.machine --tiny
    part 100 "GPU tests" pytest -q -m slow tests/slow/test_gpu.py
    part 400 "Steps" benchmarks.step --size tiny-I tiny-II --batch 1 2 --fused torch
    exit
fi
half="--device cuda --dtype float16 --batch 1 8"
part 20 "The machine" benchmarks.machine --device cuda
part 80 "GPU tests" pytest -q -m slow tests/slow/test_gpu.py
part 150 "Stage I at IF-I-XL's size" benchmarks.step --size IF-I-XL $half --minutes 1.5
part 70 "Stage II at IF-II-L's size" benchmarks.step --size IF-II-L $half --minutes 0.8
part 40 "Stage I with the Triton passes" benchmarks.step --size IF-I-L $half --fused triton --minutes 0.4
