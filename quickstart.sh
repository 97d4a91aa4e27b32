#!/usr/bin/env bash
# The main job in minutes, on a CPU: a real small model, the data programs, 28 steps of training (4 of them
# write rationales), and the evaluation part of examples/ before and after. `make quickstart` calls it; everything lands in OUT.
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
MODEL=models/SmolLM2-135M-Instruct
OUT=${OUT:-checkpoints/GRACE/quickstart}
STEPS=${STEPS:-28}
export PYTHON
# Where there are GPUs too: train.sh would train the paper's model there.
export CUDA_VISIBLE_DEVICES=

echo "== 1/4 model"
"$PYTHON" -m verl.get_demo_model
echo "== 2/4 data"
"$PYTHON" process_data.py --mode supervised --input_file examples/triplets.jsonl --local_dir data/quickstart --test_ratio 0.1
"$PYTHON" offline_filter_data.py --train_parquet data/quickstart/train.parquet --val_parquet data/quickstart/test.parquet \
    --out_dir data/quickstart_filtered --tokenizer_path "$MODEL" --max_len 160
echo "== 3/4 training, $STEPS steps"
TRAIN_FILE=data/quickstart_filtered/train.parquet bash train.sh trainer.default_local_dir="$OUT" \
    trainer.experiment_name=quickstart trainer.total_training_steps="$STEPS" trainer.resume_mode=disable "$@"
echo "== 4/4 evaluation: the same texts with the untrained and the trained model"
RUN="$OUT" STEP="$STEPS" BASE_MODEL="$MODEL" TASK_DIR=examples/eval OUTPUT_DIR="$OUT/evaluation" bash eval.sh --show 2
"$PYTHON" -m verl.report "$OUT"
echo "The trained model: $OUT/global_step_$STEPS/huggingface   the run as a page: $OUT/report.html"
