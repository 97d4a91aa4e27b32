"""Write verl/trainer/config/ppo_trainer.yaml from the dataclasses of verl/config.py.

    python3 scripts/write_config.py [--check]

The YAML is what hydra composes and what people read; the classes are where keys, defaults and meanings
are kept. With --check nothing is written: exit code 1 says that the two differ.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from verl.config import RunConfig, type_name

TARGET = Path(__file__).parent.parent / "verl/trainer/config/ppo_trainer.yaml"
HEADER = "# All keys with their defaults. Generated from verl/config.py by scripts/write_config.py.\n"


def yaml_lines(section: type[BaseModel], indent: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield f"{indent}{name}:"
            yield from yaml_lines(field.annotation, indent + "  ")
        else:
            about = (field.description or "").replace("\n", " ")
            yield f"{indent}# {about} [{type_name(field.annotation)}]"
            yield f"{indent}{name}: {json.dumps(field.default)}"


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
