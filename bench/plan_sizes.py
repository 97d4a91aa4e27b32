"""The table of model sizes in docs/gpu.md: python3 bench/plan_sizes.py [--sizes 0.5B ...]

Which Qwen2.5 models train with the recipe of train.sh on which GPUs, by `verl.plan`. No weights are needed, and no GPU.
It takes minutes for each size, and the traces are kept.
"""

import argparse
import tempfile
from pathlib import Path

from scale import SHAPES
from transformers import Qwen2Config

from verl.planning.plan import GIB, Machines, MemoryPlan, make_plan
from verl.planning.remedies import with_settings
from verl.trainer.compose import compose_config
from verl.trainer.memory_plan import find_work

GPUS, MEMORY = (1, 2, 4, 8), (24, 48, 80, 141)
# As in train.sh.
RECIPE = (
    "data.train_batch_size=64", "data.max_prompt_length=1024", "data.max_response_length=2048",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16", "actor_rollout_ref.rollout.n=8",
    "actor_rollout_ref.actor.fsdp_config.param_offload=True",
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload=True", "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.gpu_memory_utilization=0.5",
)  # fmt: skip
_ACTOR = "actor_rollout_ref.actor"
# From the recipe's budget of tokens down, each with what it is called in the table.
STEPS = {
    "recipe": (),
    "4096 tokens": ((f"{_ACTOR}.ppo_max_token_len_per_gpu", 4096),),
    "4096 tokens, offload policy": (
        (f"{_ACTOR}.ppo_max_token_len_per_gpu", 4096), (f"{_ACTOR}.strategy", "fsdp2"),
        (f"{_ACTOR}.fsdp_config.offload_policy", True), ("actor_rollout_ref.ref.fsdp_config.offload_policy", True),
    ),
}  # fmt: skip


def cells(folder: Path, gpus: int) -> list[str]:
    """What fits, for each size of GPU memory."""
    config = compose_config(
        [*RECIPE, f"actor_rollout_ref.model.path={folder}",
         f"actor_rollout_ref.rollout.tensor_model_parallel_size={2 if gpus % 2 == 0 else 1}"], has_data=False,
    )  # fmt: skip
    work = find_work(config)
    found: dict[int, str] = {}
    last: dict[int, MemoryPlan] = {}
    for name, settings in STEPS.items():
        for memory in MEMORY:
            if memory not in found:
                last[memory] = make_plan(with_settings(config, settings), Machines(memory * GIB, gpus), work)
                if not last[memory].misfits():
                    found[memory] = name
    return [found.get(memory) or f"no: {', '.join(last[memory].misfits())}" for memory in MEMORY]


def main(sizes: list[str]) -> None:
    print("| model | GPUs |", *(f"{memory} GiB |" for memory in MEMORY))
    print("|" + "---|" * (2 + len(MEMORY)))
    for size in sizes:
        shape = SHAPES[size]
        with tempfile.TemporaryDirectory() as folder:
            Qwen2Config(
                hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
                num_key_value_heads=shape.key_heads, intermediate_size=shape.inner, tie_word_embeddings=shape.tied,
                vocab_size=shape.vocabulary, max_position_embeddings=32768, dtype="bfloat16",
            ).save_pretrained(folder)  # fmt: skip
            for gpus in GPUS:
                print(f"| {size} | {gpus} |", *(f"{cell} |" for cell in cells(Path(folder), gpus)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    main(parser.parse_args().sizes)
