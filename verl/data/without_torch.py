"""Importing this loads transformers' tokenizers without torch: 140 MB instead of 610, in a fraction of the time.

For programs that tokenize and do nothing else; later imports of torch fail. A tokenizer's own code (trust_remote_code)
may need torch, so it must not be used there.
"""

import os
import sys

# transformers looks for torch with `find_spec`, to which None here means that it is not installed. A process that has
# torch already keeps it.
sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
# It would warn that it found no torch.
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"

import transformers.models.auto.tokenization_auto  # noqa: E402, F401
