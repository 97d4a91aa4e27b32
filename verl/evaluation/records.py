"""The name and the revision of a model in the records of an evaluation."""

from pathlib import Path

from verl.checkpoint.run_folder import MODEL


def name_of(path: str) -> str:
    """A model's name from its path; the folder of a checkpoint is called by its run and step."""
    folder = Path(path)
    # "." and "runs/.." are folders too, and have no name as they stand.
    parts = (folder.resolve() if folder.name in ("", "..") else folder).parts
    if parts[-1] == MODEL and len(parts) >= 3:
        return f"{parts[-3]}-{parts[-2]}"
    return parts[-1]


def revision_of(weights: str) -> str:
    """A model's revision in mteb's results, from the hash of its weights."""
    return weights[:16]
