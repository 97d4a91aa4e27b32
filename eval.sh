#!/usr/bin/env bash
# Evaluate a trained embedder.
#
#   bash eval.sh      the newest checkpoint of checkpoints/GRACE/supervised; where no GPU is visible that of
#                     checkpoints/GRACE/quickstart, on examples/eval
#   RUN=checkpoints/GRACE/my_run STEP=100 SUITE=eng-v1 bash eval.sh
#   RUN=models/some-model TASKS="STS17 BIOSSES" bash eval.sh --no_thinking
#
# From the environment:
#   RUN         run folder, step folder or model (a folder or a hub name)
#   STEP        a step of the run, or latest
#   SUITE       quick (9 of the paper's tasks), eng-v1 (the paper's 56), eng-v2, nano
#   TASKS       names of tasks instead of a suite
#   TASK_DIR    a folder of local tasks
#   BASE_MODEL  a model to evaluate too, to show the differences
#   MODEL_NAME, OUTPUT_DIR, BATCH_SIZE, INPUT_MAX_LENGTH, THINKING_MAX_LENGTH, POOLING_METHOD,
#   VLLM_TENSOR_PARALLEL_SIZE, VLLM_GPU_MEMORY_UTILIZATION, PYTHON
# Arguments are passed to eval_mteb.py. Lengths and pooling default to those of training.
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
OUTPUT_DIR=${OUTPUT_DIR:-results}
GPUS=$("$PYTHON" -c 'from verl.utils.gpus import count_gpus; print(count_gpus())')

fail() {
    echo "eval.sh: $1" >&2
    exit 2
}

if (( GPUS > 0 )); then
    RUN=${RUN:-checkpoints/GRACE/supervised}
else
    RUN=${RUN:-checkpoints/GRACE/quickstart}
    if [[ -z "${SUITE:-}${TASKS:-}${TASK_DIR:-}" ]]; then
        echo "eval.sh: no GPU is visible; evaluating $RUN on the local tasks of examples/eval"
        TASK_DIR=examples/eval
    fi
fi

# The model's folder: RUN itself, with a whole model or an adapter, or a checkpoint of the run.
if [[ -f "$RUN/config.json" || -f "$RUN/adapter_config.json" ||
    ( ! -e "$RUN" && "$RUN" == */* && "$RUN" != checkpoints/* && "$RUN" != /* && "$RUN" != .* ) ]]; then
    [[ -z "${STEP:-}" ]] || fail "STEP=$STEP: RUN=$RUN is a model, and has no steps; leave STEP out"
    MODEL=$RUN
else
    [[ -d "$RUN" ]] || fail "RUN=$RUN does not exist; train first (bash train.sh, or make quickstart), or give RUN"
    if [[ -d "$RUN/actor" ]]; then
        [[ -z "${STEP:-}" ]] || fail "STEP=$STEP: RUN=$RUN is a step already; leave STEP out, or give the run's folder"
        CHECKPOINT=${RUN%/}
    elif [[ "${STEP:-latest}" != latest ]]; then
        CHECKPOINT=${RUN%/}/global_step_$STEP
    else
        TRACKER=$RUN/latest_checkpointed_iteration.txt
        [[ -f "$TRACKER" ]] || fail "RUN=$RUN holds no checkpoint ($TRACKER is missing)"
        CHECKPOINT=${RUN%/}/global_step_$(< "$TRACKER")
    fi
    [[ -d "$CHECKPOINT" ]] || fail "STEP=${STEP:-latest}: there is no $CHECKPOINT; there are: $(cd "$RUN" && echo global_step_*)"
    MODEL=$CHECKPOINT/huggingface
    if ! compgen -G "$MODEL/*.safetensors" > /dev/null; then
        # A checkpoint with shards only, as verl 0.4 writes them. Its whole path, as runs may have the same name.
        MODEL=merge_models$(realpath "$CHECKPOINT")/huggingface
        if [[ ! "$MODEL/merge_model.json" -nt "$CHECKPOINT/actor" ]]; then
            "$PYTHON" -m verl.merge_model merge --backend fsdp --local_dir "$CHECKPOINT" --target_dir "$MODEL"
        fi
    fi
fi

if [[ -z "${TASKS:-}${TASK_DIR:-}" ]]; then
    WHAT=(--suite "${SUITE:-quick}")
else
    [[ -z "${SUITE:-}" ]] || fail "SUITE=$SUITE with TASKS or TASK_DIR: give a suite, or tasks"
    # shellcheck disable=SC2206 -- names of tasks are words
    WHAT=(${TASKS:+--tasks $TASKS} ${TASK_DIR:+--task_dir "$TASK_DIR"})
fi

mkdir -p "$OUTPUT_DIR"
TIMING_LOG=$OUTPUT_DIR/timing_results_$(date +%Y%m%d_%H%M%S).txt
echo "eval.sh: $MODEL, ${WHAT[*]}; seconds by task go to $TIMING_LOG"
exec "$PYTHON" eval_mteb.py \
    --model_path "$MODEL" \
    --output_dir "$OUTPUT_DIR" \
    --timing_log "$TIMING_LOG" \
    ${MODEL_NAME:+--model_name "$MODEL_NAME"} \
    ${BASE_MODEL:+--base_model "$BASE_MODEL"} \
    ${BATCH_SIZE:+--batch_size "$BATCH_SIZE"} \
    ${INPUT_MAX_LENGTH:+--input_max_length "$INPUT_MAX_LENGTH"} \
    ${THINKING_MAX_LENGTH:+--thinking_max_length "$THINKING_MAX_LENGTH"} \
    ${POOLING_METHOD:+--pooling_method "$POOLING_METHOD"} \
    "${WHAT[@]}" \
    "$@"
