"""What was started, in the run folder from the first moment on: run.json."""

import json
from datetime import UTC, datetime
from pathlib import Path

from verl.checkpoint.model_card import training_command
from verl.config import RunConfig
from verl.utils.files import replace_file
from verl.utils.run_files import RECORD
from verl.utils.versions import installed_versions


def write_record(folder: Path, config: RunConfig, total_steps: int) -> None:
    """Write `command`, `config`, `versions`, `total_steps`, and `started`, of this start of the run."""
    record = {
        "command": training_command(),
        "started": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "total_steps": total_steps,
        "versions": installed_versions(),
        "config": config.model_dump(mode="json"),
    }
    replace_file(folder / RECORD, json.dumps(record, indent=1) + "\n")
