"""Turn off warnings and progress bars of libraries, so that the run's own lines can be read."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Turn off what libraries print below an error; called once at the start of a process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("torch.distributed", "ray", "filelock", "fsspec", "datasets", "vllm"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
