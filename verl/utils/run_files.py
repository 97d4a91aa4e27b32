"""Names of what a run writes into its folder besides checkpoints; who writes them and who reads them agree here."""

import re
from pathlib import Path

METRICS, SAMPLES = "metrics.jsonl", "samples"
"""Every metric of every step, and the rationales and rewards of some of its samples."""
RECORD = "run.json"
"""What was started: command, configuration, versions."""
REPORT = "report.html"
DIAGNOSTICS, PROBE = "diagnostics", "probe.json"
"""What the probe texts' rationales and vectors became over the steps, and the texts themselves."""
_OF_STEP = re.compile(r".*step_(\d+)\.\w+")


def files_of_steps(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    """The files of a pattern whose names end in `step_N` and a suffix, each with its N, in the order of the steps."""
    found = [(_OF_STEP.fullmatch(file.name), file) for file in folder.glob(pattern)]
    return sorted((int(match[1]), file) for match, file in found if match)
