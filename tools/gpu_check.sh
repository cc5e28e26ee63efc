#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: on a machine with 1 or 8 GPUs (or any number)
#
#   bash tools/gpu_check.sh [--out DIR] [--only PART ...] [--dry-run]
#
# attention kernels against the mask rule, forward and gradients; loss curves in float32, bf16 and FP8 on the GPU against
# float32 on the CPU; layouts over NCCL by tools/parity.py; time and memory by recipe beside what tools/plan.py expects.
# Writes DIR/report.md and DIR/report.json (default runs/gpu_check), made to be attached to a bug or a benchmark table.
# Exit code: 0 all passed, but for what this GPU cannot do (FP8 on an A100), which the report names; 1 something failed,
# the report and the last lines say what; 3 no GPU here, nothing was run. --dry-run lists the commands for this machine's
# GPUs (or --gpus N) and runs nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi
exec python tests/gpu/check.py "$@"
