"""Seconds of a training step on 8 to 512 GPUs, on paper: python3 bench/scale.py [--model 1.5B] [--samples 64]

Nothing is run. Each phase is its arithmetic or its bytes, divided by a published peak of the hardware and by the share
of it that is assumed to be reached; docs/scale.md discusses the result. --weak lets the samples grow with the GPUs.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

from common import markdown, write_json

GIGA = 1e9
BF16, FLOAT32 = 2, 4


@dataclass(frozen=True)
class Shape:
    """A Qwen2.5 model, from its config.json."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    inner: int
    vocabulary: int
    tied: bool

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """All of them but biases and norms."""
        return self.of_layers + self.of_root

    @property
    def of_layers(self) -> int:
        keys = 2 * self.hidden * self.key_heads * self.head_size
        return self.layers * (2 * self.hidden**2 + keys + 3 * self.hidden * self.inner)

    @property
    def of_root(self) -> int:
        """Embedding and LM head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def cache_bytes(self) -> int:
        """Of one token's keys and values in all layers, bfloat16."""
        return 2 * self.layers * self.key_heads * self.head_size * BF16

    @property
    def weights(self) -> int:
        """Tensors that a sync sends: 12 of a layer (7 matrices, 3 biases, 2 norms), a last norm, the vocabulary."""
        return 12 * self.layers + (2 if self.tied else 3)


SHAPES = {
    "0.5B": Shape(896, 24, 14, 2, 4864, 151936, True),
    "1.5B": Shape(1536, 28, 12, 2, 8960, 151936, True),
    "3B": Shape(2048, 36, 16, 2, 11008, 151936, True),
    "7B": Shape(3584, 28, 28, 4, 18944, 152064, False),
    "14B": Shape(5120, 48, 40, 8, 13824, 152064, False),
    "32B": Shape(5120, 64, 40, 8, 27648, 152064, False),
}


@dataclass(frozen=True)
class Hardware:
    """One H100 SXM of a DGX: peaks of NVIDIA's data sheets, one direction each, and what is assumed to be reached."""

    flop_per_s: float = 989e12
    """bfloat16, dense."""
    memory: float = 3350 * GIGA
    nvlink: float = 450 * GIGA
    """To the other GPUs of its node."""
    network: float = 50 * GIGA
    """Its own 400 Gb/s adapter; a ring over nodes uses those of all 8 GPUs at once."""
    host: float = 64 * GIGA
    """PCIe 5 x16."""
    gpus_per_node: int = 8
    flop_share: float = 0.4
    memory_share: float = 0.7
    link_share: float = 0.7
    kernel_s: float = 25e-6
    """To start one kernel, where the host is what decoding waits for (enforce_eager=True)."""
    kernels_per_layer: int = 12
    collective_s: float = 60e-6
    """Least time of one collective."""


@dataclass(frozen=True)
class Recipe:
    """`train.sh` on GPUs. Lengths are assumed: no run has measured them."""

    samples: int = 64
    n: int = 8
    anchors: int = 2
    prompt: int = 300
    longest: int = 2048
    """Rationales are spread evenly from no token to this many."""
    mini_batch: int = 16
    tokens_per_micro_batch: int = 16384
    tensor_parallel: int = 2

    @property
    def trained_rows(self) -> int:
        return self.samples * self.n

    @property
    def rows(self) -> int:
        return self.trained_rows + self.samples * self.anchors

    @property
    def row_tokens(self) -> float:
        return self.prompt + self.longest / 2

    @property
    def updates(self) -> int:
        return max(1, self.samples // self.mini_batch)


def generation(shape: Shape, recipe: Recipe, hardware: Hardware, gpus: int) -> float:
    """Seconds until the longest rationale ends: each of its tokens waits for all weights and the cache of the rows."""
    engines = max(1, gpus // recipe.tensor_parallel)
    rows = -(-recipe.rows // engines)
    bandwidth = hardware.memory * hardware.memory_share * recipe.tensor_parallel
    launches = shape.layers * hardware.kernels_per_layer * hardware.kernel_s
    links = 2 * shape.layers * hardware.collective_s if recipe.tensor_parallel > 1 else 0
    seconds = 0.0
    for token in range(recipe.longest):
        alive = rows * (1 - token / recipe.longest)
        read = shape.parameters * BF16 + alive * (recipe.prompt + token) * shape.cache_bytes
        compute = 2 * shape.parameters * alive / (hardware.flop_per_s * hardware.flop_share * recipe.tensor_parallel)
        seconds += max(read / bandwidth, compute, launches) + links
    return seconds


def ring_bandwidth(hardware: Hardware, gpus: int) -> float:
    """Bytes a second that a GPU receives in a gather over all of them."""
    whole_node = hardware.network * hardware.gpus_per_node
    slowest = hardware.nvlink if gpus <= hardware.gpus_per_node else min(hardware.nvlink, whole_node)
    return slowest * hardware.link_share


def forward_flop(shape: Shape, recipe: Recipe, rows: int) -> float:
    """Products of the weights, and of queries with keys and values, half of which a causal mask leaves out."""
    tokens = rows * recipe.row_tokens
    return tokens * (2 * shape.parameters + 2 * shape.layers * shape.hidden * recipe.row_tokens)


def scoring_bytes(shape: Shape, gpus: int) -> float:
    """What a GPU receives for a micro-batch: the layers are gathered, the root stays from the first one on."""
    return BF16 * shape.of_layers * (gpus - 1) / gpus


def update_bytes(shape: Shape, gpus: int) -> float:
    """For the forward and the backward of a micro-batch: gathers, the layers' once more, and gradients in float32."""
    gathered = BF16 * (2 * shape.of_layers + shape.of_root)
    return (gathered + FLOAT32 * shape.parameters) * (gpus - 1) / gpus


def passes(shape: Shape, recipe: Recipe, hardware: Hardware, gpus: int, training: bool) -> tuple[float, float]:
    """Seconds of all forwards, with backwards where training, and those of them that wait for links alone."""
    rows, rounds = (recipe.trained_rows, recipe.updates) if training else (recipe.rows, 1)
    flop = forward_flop(shape, recipe, rows) * (4 if training else 1)  # backward is two, checkpointing one more
    compute = flop / (gpus * hardware.flop_per_s * hardware.flop_share)
    tokens_per_round = rows * recipe.row_tokens / gpus / rounds
    micro_batches = rounds * max(1, -(-int(tokens_per_round) // recipe.tokens_per_micro_batch))
    sent = update_bytes(shape, gpus) if training else scoring_bytes(shape, gpus)
    least = shape.layers * (3 if training else 1) * hardware.collective_s
    links = micro_batches * max(sent / ring_bandwidth(hardware, gpus), least)
    return max(compute, links), max(0.0, links - compute)


def moving(shape: Shape, hardware: Hardware, gpus: int) -> float:
    """Weights to and from host memory for the sync, scoring and update, and the optimizer's moments for the update."""
    shard = shape.parameters / gpus
    return (3 * 2 * FLOAT32 + 2 * 2 * FLOAT32) * shard / (hardware.host * hardware.link_share)


def sync_bytes(shape: Shape, gpus: int) -> float:
    return BF16 * shape.parameters * (gpus - 1) / gpus


def sync(shape: Shape, hardware: Hardware, gpus: int) -> float:
    return max(sync_bytes(shape, gpus) / ring_bandwidth(hardware, gpus), shape.weights * hardware.collective_s)


def step(shape: Shape, recipe: Recipe, hardware: Hardware, gpus: int) -> dict[str, float]:
    """Seconds by phase."""
    scoring, _ = passes(shape, recipe, hardware, gpus, training=False)
    update, waits = passes(shape, recipe, hardware, gpus, training=True)
    found = {
        "generation": generation(shape, recipe, hardware, gpus),
        "scoring": scoring,
        "update": update,
        "sync": sync(shape, hardware, gpus),
        "offload": moving(shape, hardware, gpus),
    }
    return {**found, "step": sum(found.values()), "update waits for links": waits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="1.5B")
    parser.add_argument("--samples", type=int, default=64, help="of a step; with --weak of a step on 8 GPUs")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of the longest rationale")
    parser.add_argument("--tensor_parallel", type=int, default=2)
    parser.add_argument("--weak", action="store_true", help="samples grow with the GPUs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    shape, hardware = SHAPES[args.model], Hardware()
    table, first = [], None
    for gpus in (8, 16, 32, 64, 128, 256, 512):
        samples = args.samples * gpus // 8 if args.weak else args.samples
        recipe = Recipe(samples=samples, longest=args.longest, tensor_parallel=args.tensor_parallel)
        seconds = step(shape, recipe, hardware, gpus)
        rate = recipe.rows / seconds["step"] / gpus
        first = first or rate
        cells = [f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in seconds.values()]
        table.append([gpus, samples, *cells, f"{rate / first:.0%}"])
    columns = ["GPUs", "samples", *seconds, "rows a second and GPU"]
    print(markdown(columns, table))
    write_json(args.json, {"hardware": asdict(hardware), "model": args.model, "columns": columns, "table": table})


if __name__ == "__main__":
    main()
