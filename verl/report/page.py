"""The page: one file that holds its styles, scripts and data, and that a browser opens without a network.

Data is JSON in a script element that is not executed; the page's own script shows it as text. The policy in the page
lets the browser run these scripts and styles alone, by their hashes, and load nothing.
"""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from verl.report.curves import curve_groups, time_by_phase
from verl.report.facts import progress, what_was_run
from verl.report.groups import best_and_worst
from verl.report.probe import followed_rationales, probe_map, why_no_probe
from verl.report.read import Run, read_run
from verl.report.scores import score_table
from verl.report.thin import in_page
from verl.utils.files import replace_file

_HERE = Path(__file__).parent
_STYLES = ("vendor/uPlot.min.css", "page.css")
_SCRIPTS = ("vendor/uPlot.iife.min.js", "elements.js", "charts.js", "map.js", "page.js")


def write_report(folders: Sequence[Path], out: Path, evaluations: Sequence[Path] = ()) -> None:
    """Write the page of one run, or of several beside each other.

    Args:
        evaluations: output folders of `eval_mteb.py` besides the runs' own.

    Raises:
        UserError: a folder is not a run's.
        OSError: the page could not be written.
    """
    replace_file(out, page_of(report_data([read_run(folder) for folder in folders], evaluations)))


def report_data(runs: Sequence[Run], evaluations: Sequence[Path] = ()) -> dict[str, Any]:
    """All that the page shows, by section."""
    share = 1 / len(runs)
    sections = {
        "facts": what_was_run(runs),
        "curves": curve_groups(runs),
        "phases": time_by_phase(runs),
        "scores": score_table(runs, evaluations),
        "rationales": followed_rationales(runs),
        "groups": [best_and_worst(run, share) for run in runs],
        "maps": [probe_map(run, share) for run in runs],
    }
    # Last: reading what the sections show is what finds problems.
    heads = [
        {
            "name": name,
            "progress": progress(run),
            "alerts": [vars(alert) for alert in run.alerts],
            "diagnosed": any(metric.startswith("diag/") for metric in run.series),
            "why_blind": why_no_probe(run),
            "problems": run.problems,
        }
        for name, run in zip(distinct_names(runs), runs, strict=True)
    ]
    return {"written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "runs": heads, **sections}


def page_of(data: dict[str, Any]) -> bytes:
    """The whole page."""
    styles = [_read(name) for name in _STYLES]
    scripts = [_read(name) for name in _SCRIPTS]
    policy = "; ".join(
        (
            "default-src 'none'", f"script-src {_hashes(scripts)}", f"style-src {_hashes(styles)}", "base-uri 'none'",
            "form-action 'none'",
        )
    )  # fmt: skip
    parts = {
        b"<!-- policy -->": f'<meta http-equiv="Content-Security-Policy" content="{policy}">'.encode(),
        b"<!-- styles -->": b"\n".join(_elements("style", styles)),
        b"<!-- scripts -->": b"\n".join(_elements("script", scripts)),
        b"<!-- data -->": b'<script type="application/json" id="data">' + in_page(data) + b"</script>",
    }
    page = _read("page.html")
    for place, content in parts.items():
        before, _, after = page.partition(place)
        page = before + content + after
    return page


def distinct_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names; of runs that share one, with as much of the path as tells them apart."""
    paths = [run.folder.resolve().parts for run in runs]
    depth = next((d for d in range(1, max(map(len, paths)) + 1) if len({p[-d:] for p in paths}) == len(paths)), 1)
    return ["/".join(path[-depth:]) for path in paths]


def _read(name: str) -> bytes:
    return (_HERE / name).read_bytes()


def _hashes(contents: Sequence[bytes]) -> str:
    digests = (base64.b64encode(hashlib.sha256(content).digest()).decode() for content in contents)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def _elements(tag: str, contents: Sequence[bytes]) -> Iterator[bytes]:
    return (f"<{tag}>".encode() + content + f"</{tag}>".encode() for content in contents)
