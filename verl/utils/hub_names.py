"""Models are given as folders or as hub names; this tells which."""

import re
from pathlib import Path


def is_hub_name(model: str) -> bool:
    """Whether a model that is given as a folder or a hub name is a hub name; a folder may look like one."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model)) and not Path(model).exists()
