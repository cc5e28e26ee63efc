# Starts one stage: sourced by pretrain_stage1.sh, sft_stage2.sh and longcontext_stage3.sh. Holds launch settings only;
# hyper-parameters live in examples/recipes.
#
#   launch STAGE SCRIPT [section.key=value ...]
#
# From the environment: RECIPE (folder in examples/recipes; default tiny), NPROC (processes on this node; default all
# GPUs, else 1), NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, PYTHON (default python).

# Processes that suit this node: its visible GPUs, or one on a CPU.
gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        printf '%s' "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c '[0-9A-Za-z]' || true
    elif command -v nvidia-smi >/dev/null 2>&1; then
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

launch() {
    local stage="$1" script="$2"
    shift 2
    local root size recipe python argument
    root="$(cd "$(dirname "$script")/.." && pwd)"
    size="${RECIPE:-tiny}"
    recipe="$root/examples/recipes/$size/$stage.yaml"
    python="${PYTHON:-python}"
    if [ ! -f "$recipe" ]; then
        echo "RECIPE=$size has no $stage: $recipe is not there. Sizes: $(cd "$root/examples/recipes" && ls -d */"$stage".yaml | xargs -n 1 dirname | tr '\n' ' ')" >&2
        return 2
    fi
    # Works from a clone that is not installed, too.
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
    local starts=true own_weights=false
    for argument in "$@"; do
        case "$argument" in
            --help | -h | --print-config) starts=false ;;
            init.checkpoint=* | run.resume=must) own_weights=true ;;
        esac
    done
    if ! $starts; then
        # One process answers these, whoever asks.
        if [ "${RANK:-0}" != 0 ]; then return 0; fi
        exec env -u RANK -u WORLD_SIZE -u LOCAL_RANK "$python" -m megatron_vlm.train "$recipe" "$@"
    fi

    local number="${stage#stage}" weights
    # A folder with this stage alone names the weights in its recipe.
    if [ "$number" -gt 1 ] && ! $own_weights && [ -f "$root/examples/recipes/$size/stage$((number - 1)).yaml" ]; then
        weights="runs/$size-stage$((number - 1))/checkpoints"
        if [ ! -e "$weights" ]; then
            echo "Stage $number starts from the weights of stage $((number - 1)), but $weights is not there." >&2
            echo "Run stage $((number - 1)) first, or name a checkpoint: init.checkpoint=DIRECTORY (empty: random weights)." >&2
            return 2
        fi
    fi

    local found
    found="$(gpus)"
    if [ "$found" -gt 0 ] && [ -z "${RECIPE:-}" ] && [ $# -eq 0 ] && [ "${RANK:-0}" = 0 ]; then
        echo "This is the tiny recipe on sample data. On a machine with GPUs, the real one starts with:"
        echo "  RECIPE=molmo2_4b bash $script data.manifest=SHARDS data.tokenizer=TOKENIZER_JSON init.checkpoint=WEIGHTS"
    fi

    # Started by torchrun or another launcher: be the trainer of this rank.
    if [ -n "${RANK:-}" ]; then
        exec "$python" -m megatron_vlm.train "$recipe" "$@"
    fi

    local processes="${NPROC:-$((found > 0 ? found : 1))}" rendezvous=(--standalone)
    if [ "$processes" = 1 ] && [ "${NNODES:-1}" = 1 ]; then
        # One process needs no launcher, and its errors are shorter without one.
        exec "$python" -m megatron_vlm.train "$recipe" "$@"
    fi
    if [ "${NNODES:-1}" -gt 1 ] || [ -n "${MASTER_ADDR:-}" ] || [ -n "${MASTER_PORT:-}" ]; then
        rendezvous=(
            --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}"
            --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}"
        )
    fi
    # One thread per process unless asked otherwise: processes that share the cores slow each other down.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    exec "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$processes" \
        -m megatron_vlm.train "$recipe" "$@"
}
