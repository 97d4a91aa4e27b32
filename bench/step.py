"""The phases of a training step, and the least time that they need.

    python3 bench/step.py [--steps 6] [--json FILE] [key=value ...]

Trains SmolLM2-135M on the example triplets: 4 triplets x 4 rationales x 48 new tokens, and 8 anchors. Prints the median
seconds of each phase over the steps after the second, and its floor: the arithmetic of its matrix products at the rate
that this machine reaches in one large product. Further key=value arguments are passed to main_ppo.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
from common import MODEL, REPO, Comparison, markdown, prepare_data, spread, train, write_json
from floor import distinct_tokens, flop_of_a_token, peak_rate

from verl.config import DataConfig
from verl.data.dataset import PromptDataset
from verl.embedding.prompts import PromptRenderer
from verl.utils.tokenizer import load_tokenizer

SHAPE = (4, 4, 48)


def arithmetic(train_file: Path, shape: tuple[int, int, int]) -> dict[str, float]:
    """FLOP of each phase's matrix products, prompts shared; without attention, which is below 2 % at these lengths."""
    triplets, n, new = shape
    body, head = flop_of_a_token()
    roles = ("positive", "query", "negative")
    renderer = PromptRenderer(load_tokenizer(str(REPO / MODEL)), 160)
    samples = PromptDataset([str(train_file)], DataConfig(), roles, renderer)
    chats = [samples[i]["chats"] for i in range(triplets)]
    prompts = {role: [tuple(p.ids) for p in renderer.render([chat[role] for chat in chats])] for role in roles}

    def packed_tokens(kinds: tuple[str, ...], response: int) -> int:
        rows = [p for k in kinds for p in prompts[k] for _ in range(n if k == "positive" else 1)]
        return distinct_tokens(rows, response)

    trained = triplets * n * new
    generated = triplets * (n + 2) * new
    return {
        "gen": packed_tokens(roles, 0) * body + generated * (body + head),
        "score": packed_tokens(roles, new) * body + trained * head,
        # Two products in the backward; the head's logits are not kept but computed again.
        "update": 2 * packed_tokens(("positive",), new) * body + 3 * trained * head,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_file = prepare_data(folder / "data")
        flop, rate = arithmetic(train_file, SHAPE), peak_rate()
        metrics = train(train_file, folder / "run", SHAPE, args.steps, *args.overrides, warm_up=2)
    seconds = {key[5:-2]: [m[key] for m in metrics] for key in metrics[0] if key.startswith("time/")}
    seconds["whole step"] = [m["wall_s"] for m in metrics]
    flop["whole step"] = sum(flop.values())
    table = []
    for phase, values in seconds.items():
        floor = flop.get(phase, np.nan) / rate
        gap = statistics.median(values) / floor
        table.append([phase, spread(values), *(("-", "-") if np.isnan(floor) else (f"{floor:.2f}", f"{gap:.1f} x"))])
    print(markdown(["phase", "seconds, median (min to max)", "floor, s", "gap"], table))
    print(f"\nFloor: {flop['whole step'] / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s.", end=" ")
    print(f"Through Ray: {statistics.median(m['perf/ray_mb'] for m in metrics):.2f} MiB a step.")
    whole = Comparison(
        "a training step, {} triplets x {} x {} tokens".format(*SHAPE), statistics.median(seconds["whole step"]),
        floor=flop["whole step"] / rate,
    )  # fmt: skip
    write_json(args.json, {"seconds": seconds, "flop": flop, "flop_per_s": rate, "table": table}, [whole])


if __name__ == "__main__":
    main()
