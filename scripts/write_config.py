"""Write verl/trainer/config/ppo_trainer.yaml from the models of verl/config.py.

    python3 scripts/write_config.py [--check]

hydra composes the YAML, and people read it; keys, defaults, ranges and meanings are defined in the models. With --check
nothing is written, and exit code 1 means that the YAML differs from the models.
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

from verl.config import RunConfig
from verl.config_checks import limits_of

TARGET = Path(__file__).parent.parent / "verl/trainer/config/ppo_trainer.yaml"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    text = HEADER + "\n".join(yaml_lines(RunConfig)) + "\n"
    if parser.parse_args().check:
        sys.exit(0 if TARGET.read_text() == text else "ppo_trainer.yaml differs from verl/config.py: run make config")
    TARGET.write_text(text)
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
