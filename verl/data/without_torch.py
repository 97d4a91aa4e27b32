"""Importing this loads transformers' tokenizers without torch: half a second and 140 MB instead of three and 610.

For programs that tokenize and do nothing else; later imports of torch fail. A tokenizer's own code (trust_remote_code)
may need torch, so it must not be used there.
"""

import os
import sys

# Said once that torch was not found, by a library that was kept from finding it.
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
sys.modules.setdefault("torch", None)  # type: ignore[arg-type]

import transformers.models.auto.tokenization_auto  # noqa: E402, F401
