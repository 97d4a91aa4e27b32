#!/usr/bin/env bash
# Train an embedder.
#
#   bash train.sh                      the paper's recipe on the visible GPUs; without a GPU the CPU recipe
#   MODE=unsupervised bash train.sh    plain texts instead of triplets
#   RECIPE=joint bash train.sh         a contrastive loss on the embeddings too, see docs/objectives.md; without a GPU
#                                      it is what triplets are trained by, and RECIPE=paper is the paper's objective
#   RECIPE=contrastive bash train.sh   that loss alone: no rationales, neither in training nor when its model embeds
#   bash train.sh --doctor             whether this machine can do that: every line OK, or what to do
#   bash train.sh --plan --gpus 4 --gpu 80   what memory, traffic and tokens the run would need on 4 GPUs of 80 GiB
#   bash train.sh trainer.save_freq=10 actor_rollout_ref.rollout.n=4 ...     any override, last word
#
# From the environment: MODE, RECIPE, MODEL, TRAIN_FILE, VAL_FILE, PYTHON, and GPUS: how many each machine has, where
# the one that starts the run has others. Several files: data.train_files=[a.parquet,b.parquet].
set -euo pipefail
cd "$(dirname "$0")"

PROGRAM=verl.trainer.main_ppo
if [[ "${1:-}" == --doctor ]]; then
    PROGRAM=verl.doctor
    shift
elif [[ "${1:-}" == --plan ]]; then
    PROGRAM=verl.plan
    shift
fi
MODE=${MODE:-supervised}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if [[ "$MODE" != supervised && "$MODE" != unsupervised ]]; then
    echo "train.sh: MODE=$MODE; use supervised or unsupervised" >&2
    exit 2
fi
if [[ "$PROGRAM" == verl.plan ]]; then
    # GPUs that need not be here.
    GPUS=$("$PYTHON" -m verl.plan --print-gpus "$@")
else
    GPUS=${GPUS:-$("$PYTHON" -c 'from verl.utils.gpus import count_gpus; print(count_gpus())')}
fi
if [[ ! "$GPUS" =~ ^[0-9]+$ ]]; then
    echo "train.sh: GPUS=$GPUS; use a number, or leave it out to count those of this machine" >&2
    exit 2
fi
# On a CPU the joint recipe scores higher in equal time: docs/experiments.md.
RECIPE=${RECIPE:-$( (( GPUS == 0 )) && [[ "$MODE" == supervised ]] && echo joint || echo paper)}
CONTRASTIVE=(
    +reward_model.reward_kwargs.contrastive_weight=1
    +reward_model.reward_kwargs.contrastive_anchors=True
)
case "$RECIPE" in
    paper)
        NAME=$MODE
        OBJECTIVE=()
        ;;
    joint)
        # A run of its own beside the paper's. With triplets most steps write no rationales, which costs a fraction.
        NAME=${MODE}_joint
        OBJECTIVE=(
            "${CONTRASTIVE[@]}"
            actor_rollout_ref.actor.embedding_grad_share=0.5
            trainer.contrastive_steps_between=$([[ "$MODE" == supervised ]] && echo 8 || echo 0)
        )
        ;;
    contrastive)
        if [[ "$MODE" != supervised ]]; then
            echo "train.sh: RECIPE=contrastive with MODE=$MODE; it learns from triplets, use MODE=supervised" >&2
            exit 2
        fi
        NAME=${MODE}_contrastive
        OBJECTIVE=(
            "${CONTRASTIVE[@]}"
            actor_rollout_ref.actor.embedding_grad_share=1
            data.think=False
            trainer.diag_freq=-1
        )
        ;;
    *)
        echo "train.sh: RECIPE=$RECIPE; use paper, joint or contrastive" >&2
        exit 2
        ;;
esac

if (( GPUS > 0 )); then
    echo "train.sh: the $RECIPE recipe, $MODE, on $GPUS visible GPU(s)"
    MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
    if [[ -z "${TRAIN_FILE:-}" ]]; then
        DATA=data/${MODE}_filtered_overlong
        TRAIN_FILE=$DATA/train.parquet
        VAL_FILE=${VAL_FILE:-$DATA/test.parquet}
    fi
    SETTINGS=(
        data.train_batch_size=64
        data.max_prompt_length=1024
        data.max_response_length=2048
        actor_rollout_ref.model.enable_gradient_checkpointing=True
        actor_rollout_ref.actor.optim.lr=1e-6
        actor_rollout_ref.actor.ppo_mini_batch_size=16
        actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384
        actor_rollout_ref.actor.fsdp_config.param_offload=True
        actor_rollout_ref.actor.fsdp_config.optimizer_offload=True
        actor_rollout_ref.rollout.name=vllm
        actor_rollout_ref.rollout.n=8
        actor_rollout_ref.rollout.tensor_model_parallel_size=$(( GPUS % 2 == 0 ? 2 : 1 ))
        actor_rollout_ref.rollout.gpu_memory_utilization=0.5
        trainer.logger='["console","wandb"]'
        trainer.save_freq=50
        trainer.total_epochs=2
        trainer.experiment_name="$NAME"
    )
else
    echo "train.sh: no GPU is visible; the $RECIPE recipe for CPUs, $MODE: SmolLM2-135M, $([[ "$RECIPE" == contrastive ]] && echo no || echo short) rationales"
    MODEL=${MODEL:-models/SmolLM2-135M-Instruct}
    if [[ "$MODEL" == models/SmolLM2-135M-Instruct ]]; then
        "$PYTHON" -m verl.get_demo_model
    fi
    if [[ -z "${TRAIN_FILE:-}" ]]; then
        DATA=data/examples_$MODE
        INPUT=examples/$([[ "$MODE" == supervised ]] && echo triplets.jsonl || echo sentences.txt)
        "$PYTHON" process_data.py --mode "$MODE" --input_file "$INPUT" --local_dir "$DATA" --test_ratio 0.1
        TRAIN_FILE=$DATA/train.parquet
        VAL_FILE=${VAL_FILE:-$DATA/test.parquet}
    fi
    # Rationales end at the limit of tokens here by intent, so there is no penalty for reaching it.
    SETTINGS=(
        data.max_prompt_length=160
        actor_rollout_ref.model.enable_gradient_checkpointing=False
        actor_rollout_ref.rollout.name=hf
        +reward_model.reward_kwargs.enable_length_penalty=False
        trainer.logger='["console"]'
        trainer.experiment_name="cpu_$NAME"
    )
    if [[ "$RECIPE" != paper ]]; then
        # docs/experiments.md compares the recipes.
        SETTINGS+=(
            data.train_batch_size=12
            data.max_response_length=16
            actor_rollout_ref.actor.optim.lr=5e-5
            actor_rollout_ref.actor.ppo_mini_batch_size=12
            actor_rollout_ref.rollout.n=2
            trainer.total_training_steps=$([[ "$MODE" == supervised ]] && echo 91 || echo 40)
        )
    else
        SETTINGS+=(
            data.train_batch_size=6
            data.max_response_length=32
            actor_rollout_ref.actor.optim.lr=1e-5
            actor_rollout_ref.actor.ppo_mini_batch_size=6
            actor_rollout_ref.rollout.n=4
            trainer.total_training_steps=40
        )
    fi
fi

VAL_FILE=${VAL_FILE:-null}
# By reference, so that hydra reads nothing into the characters of a path.
export MODEL TRAIN_FILE VAL_FILE
VALIDATION='${oc.env:VAL_FILE}'
if [[ "$VAL_FILE" == null ]]; then
    VALIDATION=null
fi

exec "$PYTHON" -m "$PROGRAM" \
    +data.train_mode="$MODE" \
    data.train_files='${oc.env:TRAIN_FILE}' \
    data.val_files="$VALIDATION" \
    actor_rollout_ref.model.path='${oc.env:MODEL}' \
    algorithm.adv_estimator=grpo \
    algorithm.norm_adv_by_std_in_grpo=False \
    reward_model.reward_manager=hidden \
    +reward_model.reward_kwargs.temperature=0.1 \
    +reward_model.reward_kwargs.with_scale=True \
    +reward_model.reward_kwargs.clustering_weight=0.2 \
    +reward_model.reward_kwargs.cross_group_weight=0.2 \
    trainer.project_name=GRACE \
    "${SETTINGS[@]}" \
    ${OBJECTIVE[@]+"${OBJECTIVE[@]}"} \
    "$@"
