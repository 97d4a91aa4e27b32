"""GraceEncoder: turns texts into vectors with the model of a folder, with rationales or without.

It renders, generates, packs and pools with the functions of training, so that its vectors are those that were
rewarded. Argument names follow sentence-transformers.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from verl.checkpoint.model_folder import model_folder, weights_revision
from verl.embedding.centre import Centre
from verl.embedding.pooling import without_direction
from verl.embedding.prompts import PromptRenderer, rationale_messages
from verl.embedding.settings import NO_MIX, EmbedderSettings, Pooling, Span
from verl.encoder.arguments import SHARD_ROWS, check_batch_size, each_text, list_texts, whole_number
from verl.encoder.backend import Backend, ModelSpec
from verl.encoder.call import EncodeCall, row_seed
from verl.encoder.call_store import CallStore, NoStore
from verl.encoder.parquet_parts import Part, write_parts
from verl.encoder.processes import ProcessesBackend
from verl.encoder.record import NO_RATIONALE, EncodedText, Sampling, TextRecord
from verl.encoder.store import EmbeddingStore
from verl.encoder.usage import Usage
from verl.encoder.vector_format import Precision, VectorFormat
from verl.errors import UserError
from verl.prompt_options import SystemPromptPlace, read_system_prompt
from verl.text_roles import INSTRUCTION, TEXT, Around, Role
from verl.utils.progress import count_bar
from verl.utils.tokenizer import load_tokenizer
from verl.workers.rollout.choose import choose_device_and_engine

# The others choose another form of the vectors, or of what is returned.
_OPTIONS_OF_PARQUET = {
    "batch_size", "show_progress_bar", "normalize_embeddings", "truncate_dim", "role", "task", "instruction", "think",
    "max_new_tokens", "temperature", "seed",
}  # fmt: skip


class GraceEncoder:
    """Embeds texts with a causal language model.

    Args:
        path: a model folder or hub name; settings come from its embedder_config.json where there is one.
        engine: generates the rationales: hf, vllm, or auto (vllm on CUDA if it can be imported, else hf).
        device: auto, cuda or cpu.
        settings: replaces the folder's own settings.
        pooling, span: replace those of the settings.
        text_share: share of the text in the mean over text and rationale; "length" = every token counts the same;
            replaces that of the settings.
        no_rationale_weight: weight of the vector without the rationale in the average with the one that has it;
            replaces that of the settings.
        centre: whether to take out the direction of the mean vector that is kept with the model (`verl.centre`);
            replaces that of the settings.
        system_prompt: text, or a file that holds it; replaces that of the settings. "" = no system turn.
        system_prompt_in: the turn that it stands in; replaces that of the settings.
        template_date: the day that a dated chat template shows, as 2024-07-26; replaces that of the settings.
        max_prompt_length: most tokens of a prompt; replaces that of the settings.
        max_new_tokens: most tokens of a rationale; replaces that of the settings. vllm is started with this limit.
        store: folder of rationales and vectors to reuse and to add to.
        num_processes: processes that share the work, one per GPU; on a CPU they share its cores. A program that
            asks for more than one must guard its main code with `if __name__ == "__main__":`.
        tensor_parallel_size: vllm: neighbouring processes that share one engine.
        gpu_memory_utilization: vllm: share of the GPU's memory that vllm takes, beside the policy, which embeds on the
            same GPU; None = what the policy and its largest forward leave, at most 0.8. On a CPU: share of the free
            host memory for the KV cache; None = 0.8.
        ignore_eos: generate every rationale to its full length (a control for measurements).

    Raises:
        ValueError: the folder, its chat template or its settings cannot be used.
        UserError: an argument is out of its range, or vllm is asked for and cannot be imported.
    """

    def __init__(  # noqa: PLR0913 - a user's options, all by name
        self,
        path: str | Path,
        *,
        engine: str = "auto",
        device: str = "auto",
        settings: EmbedderSettings | None = None,
        pooling: Pooling | None = None,
        span: Span | None = None,
        text_share: float | str | None = None,
        no_rationale_weight: float | None = None,
        centre: bool | None = None,
        system_prompt: str | None = None,
        system_prompt_in: SystemPromptPlace | None = None,
        template_date: str | None = None,
        max_prompt_length: int | None = None,
        max_new_tokens: int | None = None,
        store: Path | str | None = None,
        num_processes: int = 1,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float | None = None,
        trust_remote_code: bool = False,
        ignore_eos: bool = False,
    ) -> None:
        num_processes = whole_number("num_processes", num_processes, 1)
        tensor_parallel_size = whole_number("tensor_parallel_size", tensor_parallel_size, 1)
        if gpu_memory_utilization is not None and not 0 < gpu_memory_utilization <= 1:
            raise UserError(f"gpu_memory_utilization={gpu_memory_utilization} must be above 0 and at most 1")
        self.folder = model_folder(str(path))
        self.settings = (settings or EmbedderSettings.read(self.folder)).changed(
            pooling=pooling, span=span, text_share=text_share, no_rationale_weight=no_rationale_weight, centre=centre,
            max_prompt_length=max_prompt_length, max_new_tokens=max_new_tokens,
            system_prompt=None if system_prompt is None else read_system_prompt(system_prompt),
            system_prompt_in=system_prompt_in, template_date=template_date,
        )  # fmt: skip
        self.centre = Centre.read(self.folder, self.settings) if self.settings.centre else None
        device, engine, self.engine_reason = choose_device_and_engine(device, engine)
        spec = ModelSpec(
            folder=str(self.folder),
            engine=engine,
            device=device,
            max_model_len=self.settings.max_prompt_length + self.settings.longest_rationale,
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            ignore_eos=ignore_eos,
        )
        self.tokenizer = load_tokenizer(spec.folder, trust_remote_code)
        self.renderer = PromptRenderer(
            self.tokenizer, self.settings.max_prompt_length, self.settings.truncation, allow_empty=True,
            system_prompt_in=self.settings.system_prompt_in, template_date=self.settings.template_date,
            limit_name="max_prompt_length",
        )  # fmt: skip
        # A chat template that cannot be used is told before the weights are loaded.
        self.renderer.frame(rationale_messages("", self.settings.system_prompt))
        one_process = num_processes == tensor_parallel_size == 1
        self.backend = Backend(spec) if one_process else ProcessesBackend(spec, num_processes)
        self.usage = Usage()
        self.store = None if store is None else EmbeddingStore(Path(store))

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Self:
        """The same as the constructor, under transformers' name."""
        return cls(path, **options)

    @property
    def embedding_dim(self) -> int:
        return self.backend.facts.hidden

    @cached_property
    def revision(self) -> str:
        """Hash of the weights and of config.json."""
        return weights_revision(self.folder)

    @cached_property
    def _tokenizer_hash(self) -> str:
        return self.renderer.fingerprint()

    def encode(  # noqa: PLR0913 - sentence-transformers' arguments
        self,
        inputs: str | Iterable[str],
        *,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        precision: Precision = "float32",
        int8_ranges: np.ndarray | None = None,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        role: Role | None = None,
        task: str | None = None,
        instruction: str | None = None,
        think: bool | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        return_rationales: bool = False,
    ) -> Any:
        """Embed texts.

        Each text's rationale is sampled from a seed that depends on `seed` and the text only: batch size, order and
        the other texts do not change its vector beyond rounding.

        Args:
            inputs: one text, or N of them in a list, generator, one-dimensional array or series; a text that occurs
                several times is embedded once.
            batch_size: texts that the hf engine decodes at once, and most rows of one forward; None = what the memory
                is enough for, see `rows_that_fit`.
            show_progress_bar: None = on a terminal.
            precision: int8 = quantised by sentence-transformers, each dimension over its range of `int8_ranges`.
            int8_ranges: [2,D], the least and the largest value of each of the D dimensions that are returned; what lies
                outside is clipped. Vectors can only be compared if they have the same ranges: take them once, from
                the float32 vectors v of typical texts, np.stack([v.min(axis=0), v.max(axis=0)]).
            convert_to_tensor: return a torch tensor on the CPU instead of a numpy array.
            normalize_embeddings: return unit vectors, whose products are the cosines that training rewards; False =
                the means as they are, or the average of the two unit vectors (`no_rationale_weight`). A centre is taken
                out before. For a classifier or a clustering give False: the vectors of a language model
                lie in a narrow cone, and on unit vectors that differ by little a regularised classifier (scikit-learn's
                LogisticRegression as it is) underfits.
            truncate_dim: keep this many dimensions, the first ones; a warning where training did not look at that
                number (`EmbedderSettings.matryoshka_dims`).
            role: query or document: the template, thinking and token limit that the settings have for it; None =
                those of a text without a role.
            task: name of the instruction of the settings that {instruction} in a template stands for; None = the one
                named `default`.
            instruction: in place of one of the settings, which have a task for each.
            think: False embeds the prompt alone, without a rationale; None = as the settings say for the role.
            max_new_tokens, temperature: of the rationales; None = those of the settings.
            seed: of the sampling.
            return_rationales: also return the rationales as text.

        Returns:
            [N,H] float32 or int8, or [H] for one text; with return_rationales a pair: that, and N strings or one.

        Raises:
            UserError: `inputs` are not texts, or an argument is out of its range or does not fit the settings.
            RolloutError: the engine could not generate a rationale; no vector is returned.
            StoreError: the store cannot be read or written.
        """
        texts = list_texts(inputs)
        batch_size = check_batch_size(batch_size)
        self.warn_of_untrained(truncate_dim)
        form = VectorFormat(normalize_embeddings, truncate_dim, precision, int8_ranges, convert_to_tensor)
        form.check(self.embedding_dim)
        around = self.settings.around(role, task, instruction)
        sampling = self._sampling(role, think, max_new_tokens, temperature, seed)
        records = self._encode_records(texts, around, sampling, return_rationales, batch_size, show_progress_bar)
        vectors = form.apply(self._means(records, sampling is not None))
        rationales = [self._decode(record) for record in records] if return_rationales else []
        if isinstance(inputs, str):
            return (vectors[0], rationales[0]) if return_rationales else vectors[0]
        return (vectors, rationales) if return_rationales else vectors

    def encode_to_parquet(
        self, texts: Iterable[str], folder: Path | str, *, shard_rows: int = SHARD_ROWS,
        on_part: Callable[[Part], None] | None = None, **options: Any,
    ) -> int:  # fmt: skip
        """Embed any number of texts into a folder of parquet files, with a row of text, rationale and vector for each.

        The same call continues one that was interrupted: finished files are kept, after a comparison with the texts and
        with everything that makes the vectors. `pandas.read_parquet(folder)` reads them as one table, in order.

        Args:
            texts: taken as they are embedded, at most `shard_rows` ahead of what is on the disk.
            shard_rows: texts of a file; so many are held in memory together, and embedded again after an interruption.
            on_part: called with each file once it is on the disk, also with those that were there.
            options: of `encode`, but for precision, int8_ranges, convert_to_tensor and return_rationales.

        Returns:
            The number of texts in the folder.

        Raises:
            UserError: the folder holds something else, or was made from other texts or with other options; there are no
                texts; or see `encode`.
            RolloutError, StoreError, OSError: see `encode`, or the folder cannot be written; its finished files stay.
        """
        shard_rows = whole_number("shard_rows", shard_rows, 1)
        if unknown := sorted(options.keys() - _OPTIONS_OF_PARQUET):
            raise UserError(f"{unknown[0]}={options[unknown[0]]!r}: encode_to_parquet has no such option; leave it out")
        made_by = {
            "weights": self.revision, **self.describe(**options), "truncate_dim": options.get("truncate_dim"),
        }  # fmt: skip
        total = 0
        for part in write_parts(
            each_text(texts), Path(folder), shard_rows, made_by,
            lambda some: self.encode(some, return_rationales=True, **options),
        ):  # fmt: skip
            total += part.rows
            if on_part:
                on_part(part)
        return total

    def encode_in_full(
        self, inputs: Iterable[str], *, batch_size: int | None = None, role: Role | None = None,
        task: str | None = None, think: bool | None = None, max_new_tokens: int | None = None, seed: int = 0,
    ) -> list[EncodedText]:  # fmt: skip
        """Embed N texts and tell all that is known of each, for programs that count tokens or choose the form later.

        `VectorFormat.apply` makes of the vectors what `encode` returns. Arguments and errors are those of `encode`.
        """
        texts = list_texts(inputs)
        around = self.settings.around(role, task)
        sampling = self._sampling(role, think, max_new_tokens, None, seed)
        thinks = sampling is not None
        records = self._encode_records(texts, around, sampling, thinks, check_batch_size(batch_size), False)
        return [
            EncodedText(mean, self._decode(record), len(record.prompt.ids), record.rationale_tokens,
                        record.prompt.shortened)
            for mean, record in zip(self._means(records, thinks), records, strict=True)
        ]  # fmt: skip

    def encode_query(self, inputs: str | Iterable[str], **options: Any) -> Any:
        """Embed queries: `encode` with the role query; the other options are those of `encode`."""
        return self.encode(inputs, role="query", **options)

    def encode_document(self, inputs: str | Iterable[str], **options: Any) -> Any:
        """Embed documents; see `encode_query`."""
        return self.encode(inputs, role="document", **options)

    def similarity(self, embeddings1: np.ndarray | Tensor, embeddings2: np.ndarray | Tensor) -> Tensor:
        """[N,M] cosines of [N,H] and [M,H]."""
        first, second = (
            torch.nn.functional.normalize(torch.as_tensor(e).float(), dim=-1) for e in (embeddings1, embeddings2)
        )
        return first @ second.T

    def limit_prompts(self, tokens: int) -> None:
        """Take another max_prompt_length from now on.

        Raises:
            UserError: it is none, or more than vllm was started for.
        """
        settings, spec = self.settings.changed(max_prompt_length=tokens), self.backend.spec
        if spec.engine == "vllm" and tokens + settings.longest_rationale > spec.max_model_len:
            raise UserError(
                f"max_prompt_length={tokens} is more than vllm was started for; give GraceEncoder(..., "
                f"max_prompt_length={tokens})"
            )
        self.settings, self.renderer.max_length = settings, tokens

    def warn_of_untrained(self, truncate_dim: int | None) -> None:
        """Warn, once a process, of a number of dimensions that training did not look at."""
        trained = self.settings.matryoshka_dims or [self.embedding_dim]
        if truncate_dim not in (None, self.embedding_dim, *trained):
            # Python shows a warning of the same words and line once.
            warnings.warn(
                f"truncate_dim={truncate_dim}: this model was trained to be used with "
                f"{' or '.join(map(str, sorted(trained)))} dimensions; others may be much worse",
                stacklevel=1,
            )

    def describe(self, **options: Any) -> dict[str, Any]:
        """Everything besides text and weights that decides the float32 vectors of `encode` with these options."""
        role = options.get("role")
        sampling = self._sampling(
            role, options.get("think"), options.get("max_new_tokens"), options.get("temperature"),
            options.get("seed", 0),
        )  # fmt: skip
        prompt = self.settings.model_dump(
            include={"system_prompt", "system_prompt_in", "max_prompt_length", "truncation"}
        )
        prompt["template_date"] = self.renderer.template_date
        prompt["tokenizer_hash"] = self._tokenizer_hash
        prompt["normalize_embeddings"] = options.get("normalize_embeddings", True)
        # Where there are none, the description is that of earlier versions, whose results are still right.
        if (template := self.settings.of_role(role).template) != TEXT:
            prompt["template"] = template
        if INSTRUCTION in template:
            prompt["instruction"] = self.settings.instruction(options.get("task"), options.get("instruction"))
        if self.centre is not None:
            prompt["centre"] = hashlib.sha256(self.centre.mean(sampling is not None).tobytes()).hexdigest()
        return {**prompt, **self._describe_sampling(sampling), **self._describe_pooling(sampling)}

    def close(self) -> None:
        """Flush and close the store, and end the engine."""
        if self.store:
            self.store.close()
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _means(self, records: Sequence[TextRecord], thinks: bool) -> np.ndarray:
        """[N,H] float32: the vectors of complete records, without the centre and before normalisation."""
        means = np.zeros((len(records), self.embedding_dim), np.float32)
        for row, record in enumerate(records):
            means[row] = record.vector
        return self._centred(means, thinks)

    def _centred(self, vectors: np.ndarray, thinks: bool) -> np.ndarray:
        """[N,H], before normalisation: the direction of a vector does not depend on which of the two comes first."""
        if self.centre is None:
            return vectors
        mean = self.centre.mean(thinks)
        if len(mean) != self.embedding_dim:
            raise UserError(
                f"{self.folder} holds a centre of {len(mean)} dimensions, and its model has {self.embedding_dim}; make "
                "the centre again with python3 -m verl.centre"
            )
        return without_direction(torch.from_numpy(vectors), torch.from_numpy(mean)).numpy()

    def _sampling(
        self, role: Role | None, think: bool | None, max_new_tokens: int | None, temperature: float | None, seed: int
    ) -> Sampling | None:
        """How rationales are sampled; None without rationales."""
        own = self.settings.of_role(role)
        if not (own.think if think is None else think):
            self._check_positions(self.settings, 0)
            return None
        limit_given = own.max_new_tokens if max_new_tokens is None else max_new_tokens
        settings = self.settings.changed(max_new_tokens=limit_given, temperature=temperature)
        limit = settings.max_new_tokens
        self._check_positions(settings, limit)
        if limit > self.settings.longest_rationale and self.backend.spec.engine == "vllm":
            raise UserError(
                f"max_new_tokens={limit} is more than the {self.settings.longest_rationale} that vllm is started for; "
                f"give GraceEncoder(..., max_new_tokens={limit})"
            )
        return Sampling(limit, settings.temperature, whole_number("seed", seed))

    def _check_positions(self, settings: EmbedderSettings, rationale_tokens: int) -> None:
        """Raise `UserError` if the longest row has more positions than the model."""
        context, prompt = self.backend.facts.context, settings.max_prompt_length
        if context is None or prompt + rationale_tokens <= context:
            return
        what, lower = f"max_prompt_length={prompt} is", "lower it"
        if rationale_tokens:
            what, lower = f"max_prompt_length={prompt} and max_new_tokens={rationale_tokens} are", "lower one of them"
        raise UserError(
            f"{what} more than the model's {context} positions, beyond which its output is meaningless; {lower}"
        )

    def _encode_records(
        self, texts: Sequence[str], around: Around, sampling: Sampling | None, want_rationales: bool,
        batch_size: int | None, show_progress_bar: bool | None,
    ) -> list[TextRecord]:  # fmt: skip
        """The complete records of `texts`; equal texts share one."""
        records = self._records(list(dict.fromkeys(texts)), around, sampling)
        self.usage.texts += len(texts)
        with count_bar(len(records), "thinking" if sampling else "embedding", show_progress_bar) as advance:
            EncodeCall(
                list(records.values()), sampling, want_rationales, batch_size, self.settings, self.backend,
                self._call_store(sampling), self.usage, advance,
            ).run()  # fmt: skip
        return [records[text] for text in texts]

    def _records(self, texts: Sequence[str], around: Around, sampling: Sampling | None) -> dict[str, TextRecord]:
        """A record for each of several different texts; without sampling their rationales are empty."""
        chats = [rationale_messages(text, self.settings.system_prompt) for text in texts]
        prompts = self.renderer.render(chats, [around] * len(texts))
        self.usage.unique_texts += len(texts)
        self.usage.shortened += sum(prompt.shortened for prompt in prompts)
        self.usage.empty_texts += sum(not prompt.text for prompt in prompts)
        rationale = None if sampling else NO_RATIONALE
        seed = sampling.seed if sampling else 0
        return {
            text: TextRecord(index, prompt, row_seed(seed, prompt.ids), rationale)
            for index, (text, prompt) in enumerate(zip(texts, prompts, strict=True))
        }

    def _call_store(self, sampling: Sampling | None) -> CallStore | NoStore:
        if self.store is None:
            return NoStore()
        described = {"weights": self.revision, **self._describe_sampling(sampling)}
        return CallStore(self.store, described, self._describe_pooling(sampling), self._decode)

    def _decode(self, record: TextRecord) -> str:
        assert record.rationale is not None
        return self.tokenizer.decode(list(record.rationale.ids), skip_special_tokens=True)

    # The store's keys are hashes of these two: another name or value would find nothing that was stored before.

    def _describe_sampling(self, sampling: Sampling | None) -> dict[str, Any]:
        """What decides a rationale besides weights and prompt."""
        if sampling is None:
            return {"think": False}
        spec = self.backend.spec
        engine = {"engine": spec.engine, "dtype": spec.dtype_name, **({"ignore_eos": True} if spec.ignore_eos else {})}
        stops = {"stop_ids": list(self.backend.facts.stop_ids)}
        return {"think": True, **engine, **stops, **asdict(sampling)}

    def _describe_pooling(self, sampling: Sampling | None) -> dict[str, Any]:
        """What decides a vector besides the rationale; a centre is taken out of the vectors that are stored."""
        settings = self.settings
        # Without a rationale there is nothing to mix, and without a mix the keys are those of earlier versions.
        mix = settings.mix if sampling else NO_MIX
        mixed = {name: value for name, value in mix._asdict().items() if value != getattr(NO_MIX, name)}
        return {"pooling": settings.pooling, "span": settings.span, "pool_system_prompt": settings.pool_system_prompt,
                "forward_dtype": self.backend.spec.dtype_name, **mixed}  # fmt: skip
