#!/usr/bin/env bash
# Every figure of RESULTS.md as Markdown, each with its peer in the same run: bash benchmarks/all.sh > benchmarks/RESULTS.md
#   --tiny              a rehearsal of every part at sizes that mean nothing (five minutes)
#   --against FOLDER    README's command against another commit's checkout, in turns
#   --long              also T5-XXL streamed (11.5 GB of disk) and stage III's decoder
set -euo pipefail
cd "$(dirname "$0")/.."
tiny="" long="" against=()
while [ $# -gt 0 ]; do
    case "$1" in
        --tiny) tiny=1 ;;
        --long) long=1 ;;
        --against) against=(--against "$2"); shift ;;
        *) echo "unknown option $1" >&2; exit 2 ;;
    esac
    shift
done
part() { echo; echo "## $1"; echo; shift; echo "\`python -m benchmarks.$*\`"; echo; python -m "benchmarks.$@"; }
text() { echo; echo "## $1"; shift; echo; echo '```'; python -m "benchmarks.$@"; echo '```'; }
# Threads wait as torch has them wait by default; the command sets that for itself.
unset OMP_NUM_THREADS OMP_WAIT_POLICY GOMP_SPINCOUNT

cat << TEXT
# Results

Made by \`bash benchmarks/all.sh\` on $(date +%F) at $(git rev-parse --short HEAD 2> /dev/null || echo "an unknown commit"). "peer" is the
published loop on diffusers and transformers, as its code does the work (\`benchmarks/reference_loop.py\`). Every
table is one run, kinds in turns, nothing else running. Memory is a process's largest resident memory. No figure here
is from a GPU or from the released weights.
TEXT
if [ -n "$tiny" ]; then
    part "The machine" machine --tiny
    part "README's command" command --rounds 1 "${against[@]}" --more --steps 2
    part "One anagram of 64 px" anagram --rounds 1 --steps 3
    part "Batches, views, dtypes" variants --tiny
    part "A step at the released sizes" step --size tiny-I tiny-II
    part "Import" import_time --rounds 1
    text "T5-XXL" t5_xxl --layers 1 --dtypes float32
    part "Stage III's decoder" upscaler_decoder --latents 16 --compare
    exit
fi
part "The machine" machine
part "README's command, 64 and 256 px" command --rounds 3 "${against[@]}"
part "One anagram of 64 px" anagram --rounds 3
part "Batches, views, dtypes" variants
part "A step at the released sizes" step --size IF-I-M --batch 1
part "Import" import_time --rounds 5
if [ -n "$long" ]; then
    text "T5-XXL streamed from its files" t5_xxl
    part "Stage III's decoder, 1024 px" upscaler_decoder --latents 256
    part "Stage III's decoder, 512 px, in bands and whole" upscaler_decoder --latents 128 --compare
fi
