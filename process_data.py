"""Turn raw texts or triplets into the parquet files that training reads.

    python3 process_data.py --mode supervised --input_file triplets.jsonl --local_dir data/mine

Streams: memory does not grow with the input, but for 8 bytes a sample to count duplicates. All outputs
appear together at the end; a run that fails leaves the folder's earlier outputs alone, and
rejected.jsonl as evidence. Imports neither torch nor ray nor transformers.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from verl.data.console import complain, say, track
from verl.data.errors import UserError
from verl.data.ingest import Counts, RejectLog, Spool, ingest
from verl.data.publish import copy_to, describe_file, library_versions, move_into
from verl.data.readers import Source, open_source
from verl.data.samples import MODES, describe_fields
from verl.data.schema import SCHEMAS, build_rows
from verl.data.split import DuplicateCounter, build_splitter
from verl.data.writer import JsonArraySink, ParquetSink

SPLITS = ("train", "test")
REJECTED, MANIFEST = "rejected.jsonl", "manifest.json"
