"""The training program: python3 -m verl.trainer.main_ppo key=value ...

    --config-name NAME   a YAML of verl/trainer/config, or with --config-path of another folder
    --cfg job            as hydra's: show what was composed, and stop; nothing is checked but the keys
    --print-config       show the checked configuration of the run, and stop

The configuration is composed, checked against the data, the model and the machine, and only then are Ray
and the devices started. Exit code 2: something given is wrong, and the message says what.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from verl.config_checks import split_keys
from verl.errors import UserError
from verl.trainer.compose import CONFIG_DIR, compose_config, compose_values
from verl.trainer.overrides import plain_values, resolve
from verl.utils.console import show_any_text
from verl.utils.cpus import let_waiting_threads_sleep


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    show_any_text()
    let_waiting_threads_sleep()
    try:
        if args.cfg:
            sys.stdout.write(_composed_yaml(args))
            return 0
        config = compose_config(args.overrides, args.config_name, args.config_path)
    except UserError as error:
        sys.stderr.write(f"\nmain_ppo: {error}\n")
        return 2
    if args.print_config:
        sys.stdout.write(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
        return 0
    # This takes seconds to load, for which a help text and a wrong flag need not wait.
    from verl.trainer.train import run_program

    return run_program(config)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m verl.trainer.main_ppo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-name", "-cn", default="ppo_trainer", metavar="NAME")
    parser.add_argument("--config-path", "-cp", "--config-dir", "-cd", type=Path, default=CONFIG_DIR, metavar="DIR")
    parser.add_argument("--cfg", "-c", choices=["job"], help="show what hydra composes, and stop")
    parser.add_argument("--package", "-p", metavar="SECTION", help="with --cfg: a section alone")
    parser.add_argument("--resolve", action="store_true", help="with --cfg: replace ${...} by its value")
    parser.add_argument("--print-config", action="store_true", help="show the checked configuration, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    # Options may stand between overrides, as hydra allows it.
    return parser.parse_intermixed_args(argv)


def _composed_yaml(args: argparse.Namespace) -> str:
    """What hydra composes, as `--cfg job` of a hydra program shows it.

    Raises:
        UserError: an override that cannot be read, a key that does not exist, or no such section.
    """
    composed = compose_values(args.overrides, args.config_name, args.config_path)
    _, problems = split_keys(plain_values(composed, resolve=False))
    if problems:
        raise UserError("\n".join(problems))
    if args.resolve:
        composed = OmegaConf.create(resolve(composed))
    if args.package is None:
        return OmegaConf.to_yaml(composed)
    section = OmegaConf.select(composed, args.package)
    if not OmegaConf.is_config(section):
        raise UserError(f"--package={args.package}: there is no such section.")
    return f"# @package {args.package}\n{OmegaConf.to_yaml(section)}"


if __name__ == "__main__":
    sys.exit(main())
