#!/usr/bin/env bash
# Make the training data of both modes: raw file -> parquet -> parquet without over-long prompts.
#
#   bash process_data.sh
#
# Everything can be changed from the environment; the defaults are the paper's.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-$([[ -x "$here/.venv/bin/python" ]] && echo "$here/.venv/bin/python" || echo python3)}"
supervised_file="${SUPERVISED_FILE:-echo_data_total.jsonl}"
unsupervised_file="${UNSUPERVISED_FILE:-wiki1m_for_simcse.txt}"
data_dir="${DATA_DIR:-data}"
test_ratio="${TEST_RATIO:-0.01}"
max_len="${MAX_LEN:-1024}"
tokenizer="${TOKENIZER:-Qwen/Qwen2.5-1.5B-Instruct}"
# Text or file; without it this project's own system prompt.
system_prompt=(${SYSTEM_PROMPT+--system_prompt "$SYSTEM_PROMPT"})
# For chat templates without a system turn SYSTEM_PROMPT_IN=user, as data.system_prompt_in=user in training.
system_prompt_in=(${SYSTEM_PROMPT_IN:+--system_prompt_in "$SYSTEM_PROMPT_IN"})

say_where_data_come_from() {
    cat >&2 <<EOF
process_data.sh: neither $supervised_file nor $unsupervised_file is here.

  echo_data_total.jsonl   triplets (query, positive, negative), for supervised training: the public training
                          mixture of "Repetition Improves Language Model Embeddings" (Echo embeddings), in
                          the form that the GRACE authors share
  wiki1m_for_simcse.txt   one sentence per line, for unsupervised training: from the dataset
                          princeton-nlp/datasets-for-simcse on the Hugging Face hub,
                          https://huggingface.co/datasets/princeton-nlp/datasets-for-simcse

Put them into this folder, or name your own files in SUPERVISED_FILE and UNSUPERVISED_FILE. To try the
examples instead:

  python3 -m verl.get_demo_model
  SUPERVISED_FILE=examples/triplets.jsonl UNSUPERVISED_FILE=examples/sentences.txt \\
      TOKENIZER=models/SmolLM2-135M-Instruct bash process_data.sh
EOF
}

prepare() { # mode input
    local made="$data_dir/$1" filtered="$data_dir/$1_filtered_overlong"
    echo "== $1: $2 -> $made -> $filtered"
    "$python" "$here/process_data.py" --mode "$1" --input_file "$2" --local_dir "$made" --test_ratio "$test_ratio" \
        "${system_prompt[@]}"
    "$python" "$here/offline_filter_data.py" --train_parquet "$made/train.parquet" \
        --val_parquet "$made/test.parquet" --out_dir "$filtered" \
        --tokenizer_path "$tokenizer" --max_len "$max_len" "${system_prompt_in[@]}"
}

if [[ ! -f "$supervised_file" && ! -f "$unsupervised_file" ]]; then
    say_where_data_come_from
    exit 2
fi
if [[ -f "$supervised_file" ]]; then
    prepare supervised "$supervised_file"
else
    echo "process_data.sh: $supervised_file (SUPERVISED_FILE) is not here; only the unsupervised data are made" >&2
fi
if [[ -f "$unsupervised_file" ]]; then
    prepare unsupervised "$unsupervised_file"
else
    echo "process_data.sh: $unsupervised_file (UNSUPERVISED_FILE) is not here; only the supervised data were made" >&2
fi
