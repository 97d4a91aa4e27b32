"""Exporting a model to a sentence-transformers folder, and comparing the vectors: the work of its program."""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCardData
from jinja2 import TemplateError
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.dense import Dense
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AddedToken, AutoConfig, PreTrainedTokenizerBase

from verl.checkpoint import model_card
from verl.checkpoint.disk_errors import disk_errors
from verl.checkpoint.merge import whole_folder
from verl.checkpoint.model_folder import model_folder
from verl.embedding.pooling import without_direction
from verl.embedding.prompts import Prompt, rationale_messages
from verl.embedding.settings import EmbedderSettings
from verl.encoder.grace_encoder import GraceEncoder
from verl.encoder.sentence_transformers import GraceModule
from verl.models.policy import context_of
from verl.text_roles import ROLES, Role
from verl.utils.console import exit_code_of, say
from verl.utils.files import is_taken, new_folder
from verl.utils.logging import quiet_libraries

PROGRAM = "export_sentence_transformer"
TOLERANCE = 1e-4
TEXTS = [
    "a card", "", " \t\n ", "\x1c\xa0 odd spaces\u3000\n", "The quick brown fox jumps over the lazy dog. " * 8,
    "naïve café, 東京タワー 🦊🦊", "12 + 30 = 42", "'quoted' (words)", "- a list\n\n- of two ", "https://a.org/b.jpg",
]  # fmt: skip
# Other turns and tasks would silently change the prompt, or which tokens are pooled.
TEMPLATE = (
    "{% if messages | length != 1 or messages[0]['role'] != 'user' %}"
    "{{ raise_exception('the prompt of this model is built in: give texts, and neither a prompt nor chats') }}"
    "{% endif %}{% if task is defined and task not in ['query', 'document'] %}"
    "{{ raise_exception('this model knows queries, documents and other texts: give no other task') }}"
    "{% endif %}{% set before, after = frames[(task or '') if task is defined else ''] %}"
    "{{ before ~ (messages[0]['content'] | trim) ~ after }}"
)
CARD = """\
# {name} without rationales

{what}, one short forward pass per text.

```python
from sentence_transformers import SentenceTransformer  # 6 or newer

vectors = SentenceTransformer("path/to/this/folder").encode(["a text", "another"])  # {hidden} dimensions, unit length
```

The prompt is built in, also that of queries and documents (`encode_query`, `encode_document`): give none. Texts are cut
so that text and prompt have at most {length} tokens. Weights are float32; `model_kwargs={{"dtype": "bfloat16"}}` halves
their size and rounds the vectors.

{original}With think=False GraceEncoder gives the same vectors as this folder: over {count} texts no number differed by
more than {gap:.1e} (float32, CPU). Where a text is cut after a space or within a character, this folder keeps a few
more tokens.
Markers of the chat template in a text, such as <|im_end|>, are plain characters for GraceEncoder and markers here.
"""
_WITHOUT = "These are the embeddings of {name} WITHOUT rationales: a cheap baseline"
_AS_TRAINED = "These are the embeddings of {name}, which was trained to embed without rationales"
_ORIGINAL = """\
The model was trained to write a rationale about a text and to embed both. Those embeddings need GRACE and the original
model folder:

```python
from verl import GraceEncoder

vectors = GraceEncoder("path/to/{name}").encode(["a text", "another"])
```

"""
CARD_WITH_RATIONALES = """\
# {name}, embedding through rationales

The model writes a rationale about each text and embeds both. This takes far longer than a forward pass: the rationale
is generated token by token.

```python
from sentence_transformers import SentenceTransformer  # 6 or newer

model = SentenceTransformer("path/to/this/folder", trust_remote_code=True)
vectors = model.encode(["a text", "another"], max_new_tokens=64)  # {hidden} dimensions, unit length
```

`trust_remote_code=True` lets sentence-transformers import the class that modules.json names,
`verl.encoder.sentence_transformers.GraceModule`, from the installed package of GRACE. No code of this folder is run,
and it holds none. `encode` takes `think`, `max_new_tokens` and `seed` too, and `model_kwargs={{"engine": "vllm"}}` are
options of GraceEncoder. The prompt is in embedder_config.json: give none. Texts are cut so that text and prompt have at
most {length} tokens.

`GraceEncoder("path/to/this/folder").encode(texts)` gives the same vectors: over {count} texts no number differed by
more than {gap:.1e} (float32, CPU).
"""
# Tokens of the rationales whose vectors are compared.
_PROBE_TOKENS = 8


class VectorsDiffer(RuntimeError):
    """The exported folder does not give the encoder's vectors."""


def run_program(args: argparse.Namespace) -> int:
    """Export as the arguments of `verl.export_sentence_transformer` ask for; the exit code."""
    quiet_libraries()
    work = partial(export, args.model_path, args.output, args.rationales)
    return exit_code_of(PROGRAM, work, failures=(VectorsDiffer,), wrong=(TemplateError, ValueError, OSError))


def check_output(output: Path) -> None:
    """Raise ValueError if the output exists."""
    if is_taken(output):
        raise ValueError(f"--output={output} exists and is not an empty folder; give another, or remove it")


def check_settings(folder: Path) -> None:
    """Raise ValueError if the settings of a model allow no export without rationales."""
    settings = EmbedderSettings.read(folder)
    if settings.span == "rationale":
        raise ValueError("span=rationale pools rationales, and an export has none; use GraceEncoder")
    if settings.truncation != "right":
        raise ValueError(f"truncation={settings.truncation}: an export can only cut on the right; use GraceEncoder")
    positions = context_of(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    if positions is not None and positions < settings.max_prompt_length:
        raise ValueError(
            f"max_prompt_length={settings.max_prompt_length} is more than the model's {positions} positions; lower it "
            "in embedder_config.json"
        )


def export(model_path: str, output: Path, rationales: bool = False) -> None:
    """Write the folder under a temporary name, compare its vectors, and then give it its name.

    Args:
        rationales: whether the folder embeds with them.

    Raises:
        ValueError: this model cannot be exported.
        VectorsDiffer: nothing is written.
    """
    folder = model_folder(model_path)
    check_output(output)
    with whole_folder(folder) as whole:
        if not rationales:
            check_settings(whole)
        elif not EmbedderSettings.read(whole).think:
            raise ValueError("think=False: this model embeds without rationales; leave --rationales out")
        say(f"{PROGRAM}: embedding with GraceEncoder({model_path!r})")
        write_compared(GraceEncoder(whole, engine="hf", device="cpu"), output, rationales)
    say(f"{PROGRAM}: wrote {output}")


def write_compared(encoder: GraceEncoder, output: Path, rationales: bool) -> None:
    """Write an encoder's folder of sentence-transformers, if its vectors are the encoder's."""
    texts = probe_texts(encoder)
    options: dict[str, Any] = {"max_new_tokens": _PROBE_TOKENS} if rationales else {"think": False}
    settings = encoder.settings
    roles = [None, *(role for role in ROLES if settings.of_role(role) != settings.of_role(None))]
    expected = {role: encoder.encode(texts, role=role, **options) for role in roles}
    with new_folder(output) as making:
        say(f"{PROGRAM}: building the modules of sentence-transformers")
        model = with_rationales(encoder) if rationales else build(encoder, texts)
        with disk_errors():
            model.save_pretrained(str(making), create_model_card=False)
        say(f"{PROGRAM}: loading what was written, and comparing")
        gap = largest_gap(making, texts, expected, rationales)
        say(f"{PROGRAM}: largest difference {gap:.2e} over {len(texts)} texts")
        if not gap <= TOLERANCE:
            raise VectorsDiffer(f"that is above {TOLERANCE}; nothing is written")
        name, thinks = encoder.folder.resolve().name, settings.think
        text = (CARD_WITH_RATIONALES if rationales else CARD).format(
            name=name, hidden=encoder.embedding_dim, gap=gap, count=len(texts), length=settings.max_prompt_length,
            what=(_WITHOUT if thinks else _AS_TRAINED).format(name=name),
            original=_ORIGINAL.format(name=name) if thinks else "",
        )  # fmt: skip
        front = ModelCardData(library_name="sentence-transformers", pipeline_tag="sentence-similarity")
        (making / model_card.FILE_NAME).write_text(model_card.with_front_matter(front, text))


def largest_gap(
    folder: Path, texts: Sequence[str], expected: Mapping[Role | None, np.ndarray], rationales: bool
) -> float:
    """The largest difference of a number between the vectors of a written folder and those of the encoder, by role."""
    where: dict[str, Any] = {"model_kwargs": {"engine": "hf", "device": "cpu"}} if rationales else {}
    model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=rationales, **where)
    options: dict[str, Any] = {"max_new_tokens": _PROBE_TOKENS} if rationales else {}
    gaps = []
    for role, vectors in expected.items():
        encode = {"query": model.encode_query, "document": model.encode_document}.get(role or "", model.encode)
        gaps.append(np.abs(encode(list(texts), batch_size=2, **options) - vectors).max())
    return float(max(gaps))


def with_rationales(encoder: GraceEncoder) -> SentenceTransformer:
    """The encoder as the one module of a model."""
    return SentenceTransformer(modules=[GraceModule(encoder)], device="cpu", similarity_fn_name="cosine")


def render(encoder: GraceEncoder, texts: Sequence[str], role: Role | None) -> list[Prompt]:
    chats = [rationale_messages(text, encoder.settings.system_prompt) for text in texts]
    return encoder.renderer.render(chats, [encoder.settings.around(role)] * len(texts))


def frame(encoder: GraceEncoder, role: Role | None) -> tuple[str, str]:
    """The characters before and after a text of a role."""
    prefix, suffix = encoder.renderer.frame(rationale_messages("", encoder.settings.system_prompt))
    before, after = encoder.settings.around(role)
    return prefix + before, after + suffix


def probe_texts(encoder: GraceEncoder) -> list[str]:
    """Texts that fit, and, unless that is an error, one that is cut.

    It has no spaces: only GraceEncoder drops a space before a cut.
    """
    most = encoder.settings.max_prompt_length
    chats = [rationale_messages(text, encoder.settings.system_prompt) for text in TEXTS]
    lengths = [
        max(of_roles)
        for of_roles in zip(
            *(encoder.renderer.lengths(chats, [encoder.settings.around(role)] * len(TEXTS)) for role in (None, *ROLES)),
            strict=True,
        )
    ]
    fitting = [text for text, length in zip(TEXTS, lengths, strict=True) if length <= most]
    return fitting if encoder.settings.truncation == "error" else [*fitting, "qzjxvkwpf" * most]


def build(encoder: GraceEncoder, texts: Sequence[str]) -> SentenceTransformer:
    """The encoder's model as modules of sentence-transformers.

    Raises:
        ValueError: for some of `texts` their tokens are not the encoder's.
    """
    settings = encoder.settings
    states = {"method": "forward", "method_output_name": "last_hidden_state"}
    transformer = Transformer(
        str(encoder.folder),
        model_kwargs={"dtype": torch.float32},
        modality_config={"text": states, "message": {**states, "format": "flat"}},
        module_output_name="token_embeddings",
        unpad_inputs=False,
    )
    tokenizer = tokenizer_of(transformer)
    tokenizer.pad_token = encoder.tokenizer.pad_token
    # With padding on the left, a text's positions would depend on the other texts of its batch.
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = settings.max_prompt_length
    prompts = {role: render(encoder, texts, role) for role in (None, *ROLES)}
    frames = {role or "": frame(encoder, role) for role in prompts}
    copies: dict[int, str] = {}
    if settings.pooling == "mean" and not settings.pool_system_prompt:
        heads = {role or "": own[0].ids[: own[0].text_start] for role, own in prompts.items()}
        copies = copy_tokens(transformer, sorted({token for head in heads.values() for token in head}))
        frames = {name: ("".join(copies[token] for token in heads[name]), after) for name, (_, after) in frames.items()}
    tokenizer.chat_template = f"{{% set frames = {frames!r} %}}{TEMPLATE}"
    for role, own in prompts.items():
        check_tokens(transformer, texts, role, own, copies)
    masks = [MultiVectorMask(list(copies.values()), skiplist_tasks=["query", "document"])] if copies else []
    pooling = Pooling(encoder.embedding_dim, "lasttoken" if settings.pooling == "last" else "mean")
    modules = [transformer, *masks, pooling, *centring(encoder), Normalize()]
    return SentenceTransformer(modules=modules, device="cpu", similarity_fn_name="cosine")


def centring(encoder: GraceEncoder) -> list[Dense]:
    """The module that takes out the direction of the model's mean vector, which is linear; none without a centre."""
    if encoder.centre is None:
        return []
    size, mean = encoder.embedding_dim, torch.from_numpy(encoder.centre.mean(thinks=False))
    return [
        Dense(size, size, bias=False, activation_function=None, init_weight=without_direction(torch.eye(size), mean))
    ]


@torch.no_grad()
def copy_tokens(transformer: Transformer, tokens: Sequence[int]) -> dict[int, str]:
    """Add a token with the same input embedding for each of `tokens`, and return their names."""
    names = [f"<|frame_{token}|>" for token in tokens]
    tokenizer = tokenizer_of(transformer)
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[name] for name in names]
    # Models often have more rows than their vocabulary has tokens: those are used first.
    rows = input_embedding(transformer).num_embeddings
    transformer.model.resize_token_embeddings(max(rows - 1, *ids) + 1, mean_resizing=False)
    weight = input_embedding(transformer).weight
    weight[ids] = weight[list(tokens)]
    return dict(zip(tokens, names, strict=True))


def tokenizer_of(transformer: Transformer) -> PreTrainedTokenizerBase:
    if transformer.tokenizer is None:
        raise ValueError("sentence-transformers finds no tokenizer in the model folder; use GraceEncoder")
    return transformer.tokenizer


def input_embedding(transformer: Transformer) -> torch.nn.Embedding:
    embedding = transformer.model.get_input_embeddings()
    if not isinstance(embedding, torch.nn.Embedding):
        raise ValueError(f"the model's input embedding is a {type(embedding).__name__}; use GraceEncoder")
    return embedding


def check_tokens(
    transformer: Transformer, texts: Sequence[str], role: Role | None, prompts: Sequence[Prompt],
    copies: dict[int, str],
) -> None:  # fmt: skip
    """Compare the tokens of the modules, with copies read as their originals, with those of the encoder for a role.

    Raises:
        ValueError: they differ: the tokenizer splits a text differently beside the copies, or where it is cut.
    """
    originals = {tokenizer_of(transformer).convert_tokens_to_ids(name): token for token, name in copies.items()}
    for text, prompt in zip(texts, prompts, strict=True):
        ids = transformer.preprocess([text], task=role)["input_ids"][0].tolist()
        masked = [originals[token] for token in ids if token in originals]
        same = [originals.get(token, token) for token in ids] == prompt.ids
        if not same or (copies and masked != prompt.ids[: prompt.text_start]):
            raise ValueError(
                f"the tokenizer splits {text[:40]!r} differently in an export: its first or last characters go into "
                "one token with the template's; use GraceEncoder"
            )
