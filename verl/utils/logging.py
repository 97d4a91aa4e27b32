"""Keeping the warnings and progress bars of libraries from burying the run's own lines."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Turn down what libraries print; called once at the start of a process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("torch.distributed", "ray", "filelock", "fsspec", "datasets", "vllm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
