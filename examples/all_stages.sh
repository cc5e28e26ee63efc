#!/usr/bin/env bash
# All three stages, one after the other. Start it again after any interruption: it goes on where it was.
#   bash examples/all_stages.sh [section.key=value ...]      for every stage; RECIPE, NPROC, ... as for one stage
#
# A stage that ended with `requeue` (time limit, signal, stop file) ends the chain too, with a non-zero code.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
size="${RECIPE:-tiny}"
number=0
for script in pretrain_stage1 sft_stage2 longcontext_stage3; do
    number=$((number + 1))
    told="runs/$size-stage$number/exit.json"
    if [ -f "$told" ] && grep -q '"outcome": "finished"' "$told"; then
        echo "=== Stage $number is done: $told"
        continue
    fi
    echo "=== Stage $number"
    bash "$here/$script.sh" "$@"
    if ! grep -q '"outcome": "finished"' "$told"; then
        echo "Stage $number has not come to its end: $told says why. The same command goes on from there." >&2
        exit 85
    fi
done
