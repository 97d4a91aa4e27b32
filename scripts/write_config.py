"""Write what follows from the keys in verl/config.py and verl/verl_keys.py.

    python3 scripts/write_config.py [--check]

verl/trainer/config/ppo_trainer.yaml: hydra composes it, and people read it; keys, defaults, ranges and meanings are
defined in the models. docs/from-verl.md, below its mark: every key of verl, and what became of it. With --check nothing
is written, and exit code 1 names the file that differs.
"""

import argparse
import json
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from verl.config import RunConfig
from verl.config_fields import limits_of, walk_fields
from verl.verl_keys import ABSENT, DIFFERENCES, find_absent, verl_defaults

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "verl/trainer/config/ppo_trainer.yaml"
PAGE = ROOT / "docs/from-verl.md"
MARK = "<!-- From here on written by scripts/write_config.py. -->\n"
HEADER = "# All keys with their defaults. Generated from verl/config.py by scripts/write_config.py.\n"


def yaml_lines(section: type[BaseModel], indent: str = "") -> Iterator[str]:
    """Each key of a section as a comment line with meaning, type and range, and a line with its default."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield f"{indent}{name}:"
            yield from yaml_lines(field.annotation, indent + "  ")
        else:
            about = (field.description or "").replace("\n", " ")
            limits = limits_of(field)
            kind = type_name(field.annotation) + (f", {limits}" if limits else "")
            yield f"{indent}# {about} [{kind}]"
            yield f"{indent}{name}: {json.dumps(field.default)}"


def type_name(annotation: Any) -> str:
    """A field's type in YAML's words, such as `int | null`."""
    if typing.get_origin(annotation) is Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " | ".join(type_name(a) for a in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Annotated:
        return type_name(typing.get_args(annotation)[0])
    return "null" if annotation is type(None) else str(getattr(annotation, "__name__", annotation))


def verl_lines() -> Iterator[str]:
    """A table for each section of verl's keys; keys that one entry of `ABSENT` answers stand in one row."""
    keys, fields = verl_defaults(), dict(walk_fields(RunConfig))
    for section in dict.fromkeys(key.split(".")[0] for key in keys):
        yield from (f"\n### {section}\n", "| key of verl | its default | here |", "|---|---|---|")
        shown = set()
        for key, default in keys.items():
            if not key.startswith(f"{section}.") or key in shown:
                continue
            entry = next((e for e in ABSENT if key == e or key.startswith(f"{e}.")), key)
            together = [k for k in keys if k.startswith(f"{entry}.") and find_absent(k) is ABSENT[entry]]
            shown.update(together)
            if together:
                yield f"| `{entry}.*` | | {_became(key, fields)} |"
            else:
                yield f"| `{key}` | {_code(default)} | {_became(key, fields)} |"


def _became(key: str, fields: dict[str, FieldInfo]) -> str:
    """What became of a key of verl, in words."""
    if absent := find_absent(key):
        if absent.only is not None:
            return f"must be {_code(absent.only)}: {absent.why}"
        passing = "; any value passes" if absent.passes else ""
        off = f"; passes while `{absent.switch}` is off" if absent.switch and absent.switch != key else ""
        return f"no such key: {absent.why}{passing}{off}"
    if key not in fields:
        return "an argument of vllm.LLM; null is not passed on"
    default = fields[key].default
    words = "the same" if default == verl_defaults()[key] else f"default {_code(default)}"
    return words + (f"; {DIFFERENCES[key]}" if key in DIFFERENCES else "")


def _code(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def written_files() -> dict[Path, str]:
    """The files and what has to be in them."""
    page = PAGE.read_text().split(MARK)[0]
    return {
        TARGET: HEADER + "\n".join(yaml_lines(RunConfig)) + "\n",
        PAGE: page + MARK + "\n".join(verl_lines()) + "\n",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for file, text in written_files().items():
        if check and file.read_text() != text:
            sys.exit(f"{file.relative_to(ROOT)} differs from verl/config.py and verl/verl_keys.py: run make config")
        if not check:
            file.write_text(text)
            print(f"wrote {file}")


if __name__ == "__main__":
    main()
