"""The files of a folder of local tasks.

A file that would not be read is an error: its task would be missing in the mean.
"""

from collections.abc import Collection, Iterable
from pathlib import Path

from verl.errors import UserError

FORMATS = (".jsonl", ".parquet")
# Folder of the judgements in BEIR's layout.
QRELS = "qrels"
_DOCUMENTS = ("", ".md", ".txt")


def find_entries(folder: Path, types: Collection[str]) -> list[tuple[Path, str, str]]:
    """Path, name and type of each task in a folder, or of the folder itself where it is in BEIR's layout.

    Raises:
        UserError: there is none, or something else that is neither a document nor hidden.
    """
    if not folder.is_dir():
        raise UserError(f"--task_dir {folder} is not a folder")
    if (folder / QRELS).is_dir():
        return [(folder, _beir_name(folder.resolve()), "retrieval")]
    entries = _visible(folder)
    found = [(path, *named) for path in entries if (named := _name_and_type(path, types))]
    tasks = {path for path, _, _ in found}
    other = [path.name for path in entries if path not in tasks and not _is_document(path, types)]
    how = (
        f"name files NAME.TYPE{FORMATS[0]} (or {FORMATS[1]}) or folders NAME.TYPE with TYPE one of {', '.join(types)}; "
        f"a folder with {QRELS} needs no TYPE"
    )
    if not found:
        raise UserError(f"--task_dir {folder} holds no task; {how}{'; there is ' if other else ''}{', '.join(other)}")
    if other:
        raise UserError(f"--task_dir {folder}: {', '.join(other)} would not be read; move it away, or {how}")
    return found


def part_files(folder: Path, parts: Iterable[str]) -> dict[str, Path]:
    """The file of each part of a task; that of the qrels is test.tsv, or the only one.

    Raises:
        UserError: a part is missing or there twice, or there is another file.
    """
    files = {part: _qrels_file(folder / QRELS) if part == QRELS else _part_file(folder, part) for part in parts}
    known = {*files.values(), folder / QRELS} if QRELS in files else set(files.values())
    _check_nothing_else(folder, known)
    return files


def _name_and_type(path: Path, types: Collection[str]) -> tuple[str, str] | None:
    """The name and type of a task, or None where it is no task."""
    if (path / QRELS).is_dir():
        return _beir_name(path), "retrieval"
    name, _, kind = (path.name if path.is_dir() else path.stem).rpartition(".")
    is_task = name and kind in types and (path.is_dir() or path.suffix in FORMATS)
    return (name, kind) if is_task else None


def _beir_name(folder: Path) -> str:
    return folder.name.removesuffix(".retrieval")


def _visible(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]


def _is_document(path: Path, types: Collection[str] = ()) -> bool:
    """Whether a path is a text about the data: not one that is named like a task."""
    return path.is_file() and path.suffix.lower() in _DOCUMENTS and path.stem.rpartition(".")[2] not in types


def _part_file(folder: Path, part: str) -> Path:
    found = [file for suffix in FORMATS if (file := folder / f"{part}{suffix}").is_file()]
    if not found:
        raise UserError(f"{folder} holds no {part}{FORMATS[0]} (nor {part}{FORMATS[1]})")
    if len(found) > 1:
        raise UserError(f"{folder} holds both {' and '.join(file.name for file in found)}; move one away")
    return found[0]


def _qrels_file(folder: Path) -> Path:
    splits = sorted(folder.glob("*.tsv"))
    _check_nothing_else(folder, set(splits))
    chosen = [file for file in splits if file.name == "test.tsv"] or splits
    if len(chosen) != 1:
        names = ", ".join(file.name for file in splits) or "no .tsv file"
        raise UserError(f"{folder} holds {names}; the split that is scored is test.tsv, or the only one")
    return chosen[0]


def _check_nothing_else(folder: Path, known: Collection[Path]) -> None:
    other = [path.name for path in _visible(folder) if path not in known and not _is_document(path)]
    if other:
        raise UserError(f"{folder}: {', '.join(other)} would not be read; move it away")
