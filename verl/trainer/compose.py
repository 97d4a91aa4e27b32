"""The configuration of a run from its YAML and overrides. Imports neither torch, ray nor transformers."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from verl.config import RunConfig
from verl.config_checks import build_config
from verl.errors import UserError
from verl.trainer.overrides import hydra_overrides, resolve

CONFIG_DIR = Path(__file__).parent / "config"


def compose_config(
    overrides: list[str], config_name: str = "ppo_trainer", config_path: Path = CONFIG_DIR, has_data: bool = True
) -> RunConfig:
    """Compose YAML and overrides with hydra, and check the result.

    Args:
        has_data: False = the files of data need not be there yet.

    Raises:
        UserError: unknown keys, wrong values, missing files and bad combinations, one a line.
    """
    return build_config(resolve(compose_values(overrides, config_name, config_path)), has_data)


def compose_values(
    overrides: list[str], config_name: str = "ppo_trainer", config_path: Path = CONFIG_DIR
) -> DictConfig:
    """What hydra composes of YAML and overrides, with `${...}` as written and nothing checked.

    Raises:
        UserError: an override that cannot be read, no such YAML, or a key to be removed that does not exist.
    """
    try:
        with initialize_config_dir(str(config_path.absolute()), version_base=None):
            return compose(config_name, hydra_overrides(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(str(error)) from error
