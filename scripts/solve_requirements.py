"""Whether each set of requirements can be installed as a whole: python3 scripts/solve_requirements.py [FILE ...]

pip solves a set against the index that it is set up with and installs nothing; of large wheels it fetches the metadata
alone. Without a FILE both sets are solved, requirements.txt (CPU) and requirements-cuda.txt. Exit code 1: one has no
solution, which pip explains.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETS = ("requirements.txt", "requirements-cuda.txt")


def solve(requirements: Path) -> dict[str, str]:
    """Version by package of what pip would install into an empty environment.

    Raises:
        subprocess.CalledProcessError: there is no solution.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed"]
        command += ["--use-feature=fast-deps", "--report", str(report), "--requirement", str(requirements)]
        subprocess.run(command, check=True)
        found = json.loads(report.read_text())["install"]
    return {one["metadata"]["name"]: one["metadata"]["version"] for one in found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=[ROOT / name for name in SETS])
    failed = 0
    for file in parser.parse_args().files:
        try:
            versions = solve(file)
        except subprocess.CalledProcessError:
            failed += 1
            print(f"{file.name}: no solution")
        else:
            shown = ", ".join(
                f"{name} {versions[name]}" for name in ("torch", "transformers", "vllm") if name in versions
            )
            print(f"{file.name}: {len(versions)} packages, with {shown}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
