"""Write verl/trainer/config/ppo_trainer.yaml from the models of verl/config.py.

    python3 scripts/write_config.py [--check]

The YAML is what hydra composes and what people read; the classes are where keys, defaults and meanings
are kept. With --check nothing is written: exit code 1 says that the two differ.
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
    """A field's type as a reader writes it."""
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
        sys.exit(0 if TARGET.read_text() == text else "ppo_trainer.yaml is stale: run scripts/write_config.py")
    TARGET.write_text(text)
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
