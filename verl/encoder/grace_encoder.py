"""GraceEncoder: a model folder that turns texts into vectors, through rationales or without.

It renders, generates, packs and pools with the functions training uses, so that its vectors are those that were
rewarded. Argument names follow sentence-transformers.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from verl.checkpoint.model_folder import model_folder, weights_revision
from verl.embedding.pooling import unit
from verl.embedding.prompts import Prompt, PromptRenderer, rationale_messages
from verl.embedding.settings import EmbedderSettings, Pooling, Span
from verl.encoder.backend import EmbeddingModel, ModelSpec
from verl.encoder.call import Encoding, Shelf, Thinking, Tools, open_shelf
from verl.encoder.processes import ModelPool
from verl.encoder.store import EmbeddingStore
from verl.encoder.usage import Usage
from verl.utils.progress import count_bar
from verl.utils.tokenizer import load_tokenizer
from verl.workers.rollout.choose import choose_device_and_engine

Precision = Literal["float32", "int8"]


class GraceEncoder:
    """Embeds texts with a causal language model.

    Args:
        path: a model folder or hub name; settings come from its embedder_config.json where there is one.
        engine: writes the rationales: hf, vllm, or auto: vllm with CUDA where it imports, else hf.
        device: auto, cuda or cpu.
        settings: instead of the folder's own.
        pooling, span: instead of the settings'.
        max_prompt_length: most tokens of a prompt, instead of the settings'.
        max_new_tokens: most tokens of a rationale, instead of the settings'; vllm is started for it.
        store: folder of rationales and vectors to re-use and to add to.
        num_processes: processes that share the work, one for each GPU; on a CPU they share its cores. A program that
            asks for more than one keeps its own work under `if __name__ == "__main__":`.
        tensor_parallel_size: vllm: neighbouring processes that share one engine.
        gpu_memory_utilization: vllm: share of GPU memory; the model that embeds needs room beside it. On a CPU, of the
            free host memory for the KV cache.
        ignore_eos: write every rationale to its full length (a control for measurements).

    Raises:
        ValueError: the folder or its settings cannot be used.
        UserError: vllm is asked for and does not import.
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
        max_prompt_length: int | None = None,
        max_new_tokens: int | None = None,
        store: Path | str | None = None,
        num_processes: int = 1,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.8,
        trust_remote_code: bool = False,
        ignore_eos: bool = False,
    ) -> None:
        self.folder = model_folder(str(path))
        changes = {"pooling": pooling, "span": span, "max_prompt_length": max_prompt_length,
                   "max_new_tokens": max_new_tokens}  # fmt: skip
        base = settings or EmbedderSettings.read(self.folder)
        self.settings = EmbedderSettings.model_validate(
            {**base.model_dump(), **{name: value for name, value in changes.items() if value is not None}}
        )
        device, engine, self.engine_reason = choose_device_and_engine(device, engine)
        spec = ModelSpec(
            folder=str(self.folder),
            engine=engine,
            device=device,
            max_model_len=self.settings.max_prompt_length + self.settings.max_new_tokens,
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            ignore_eos=ignore_eos,
        )
        self.tokenizer = load_tokenizer(spec.folder, trust_remote_code)
        self.renderer = PromptRenderer(
            self.tokenizer, self.settings.max_prompt_length, self.settings.truncation, allow_empty=True
        )
        alone = num_processes == tensor_parallel_size == 1
        self.model = EmbeddingModel(spec) if alone else ModelPool(spec, num_processes)
        self.usage = Usage()
        self.store = None if store is None else EmbeddingStore(Path(store))
        self._tools = Tools(self.model, self.settings, self._decode, self.usage)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Self:
        """The same as the constructor, under transformers' name."""
        return cls(path, **options)

    @property
    def embedding_dim(self) -> int:
        return self.model.size.hidden

    @cached_property
    def revision(self) -> str:
        """Hash of the weights."""
        return weights_revision(self.folder)

    def encode(  # noqa: PLR0913 - sentence-transformers' arguments
        self,
        inputs: str | Sequence[str],
        *,
        batch_size: int = 64,
        show_progress_bar: bool | None = None,
        precision: Precision = "float32",
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        think: bool = True,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
        return_rationales: bool = False,
    ) -> Any:
        """Embed texts.

        A text's rationale is drawn from a seed of its own, made of `seed` and the text: batch size, order and the
        other texts do not change its vector beyond rounding.

        Args:
            inputs: N texts, or one; a text that occurs twice is embedded once.
            batch_size: texts that the hf engine decodes at once, and most rows of one forward.
            show_progress_bar: None = on a terminal.
            precision: int8 = quantised by sentence-transformers, with the ranges of this call's vectors.
            convert_to_tensor: a torch tensor on the CPU instead of a numpy array.
            normalize_embeddings: unit vectors, which are what training rewards; False = the means as they are.
            truncate_dim: keep the first dimensions only.
            think: False embeds the prompt alone.
            max_new_tokens, temperature: of the rationales; None = the settings'.
            seed: of the sampling.
            return_rationales: also return what the vectors were pooled over.

        Returns:
            [N,H] float32 (or int8), [H] for one text; with return_rationales a pair of that and of N strings, or one.

        Raises:
            ValueError: an argument that does not fit the settings.
            RolloutError: the engine could not write a rationale; no vector is returned.
            StoreError: the store cannot be read or written.
        """
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        thinking = self._thinking(max_new_tokens, temperature, seed) if think else None
        unique = list(dict.fromkeys(texts))
        self.usage.texts += len(texts)
        self.usage.unique_texts += len(unique)
        with count_bar(len(unique), "thinking" if think else "embedding", show_progress_bar) as advance:
            encoding = Encoding(self._render(unique), thinking, self._tools, self._shelf(thinking))
            means, rationales = encoding.run(batch_size, return_rationales, advance)
        place = {text: row for row, text in enumerate(unique)}
        rows = [place[text] for text in texts]
        vectors = _finish_vectors(means[rows], normalize_embeddings, truncate_dim, precision, convert_to_tensor)
        chosen = [rationales[row] for row in rows] if return_rationales else []
        if isinstance(inputs, str):
            return (vectors[0], chosen[0]) if return_rationales else vectors[0]
        return (vectors, chosen) if return_rationales else vectors

    def encode_query(self, inputs: str | Sequence[str], **options: Any) -> Any:
        """Embed queries; the model is asked the same of a query as of any text. Options are those of `encode`."""
        return self.encode(inputs, **options)

    def encode_document(self, inputs: str | Sequence[str], **options: Any) -> Any:
        """Embed documents; see `encode_query`."""
        return self.encode(inputs, **options)

    def similarity(self, embeddings1: np.ndarray | Tensor, embeddings2: np.ndarray | Tensor) -> Tensor:
        """[N,M] cosines of [N,H] and [M,H]."""
        first, second = (
            torch.nn.functional.normalize(torch.as_tensor(e).float(), dim=-1) for e in (embeddings1, embeddings2)
        )
        return first @ second.T

    def describe(self, **options: Any) -> dict[str, Any]:
        """Everything that decides a vector besides text and weights, as `encode` with these options would have it."""
        thinking = None
        if options.get("think", True):
            thinking = self._thinking(options.get("max_new_tokens"), options.get("temperature"), options.get("seed", 0))
        prompt = self.settings.model_dump(include={"system_prompt", "max_prompt_length", "truncation"})
        return {**prompt, **self._sampling(thinking), **self._pooling()}

    def close(self) -> None:
        """Flush and close the store, and end the engine."""
        if self.store:
            self.store.close()
        self.model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _thinking(self, max_new_tokens: int | None, temperature: float | None, seed: int) -> Thinking:
        settings = self.settings
        limit = settings.max_new_tokens if max_new_tokens is None else max_new_tokens
        context = self.model.size.context
        if context is not None and settings.max_prompt_length + limit > context:
            raise ValueError(
                f"max_prompt_length={settings.max_prompt_length} and max_new_tokens={limit} are more than the model's "
                f"{context} positions, beyond which it writes nonsense; lower one of them"
            )
        if limit > settings.max_new_tokens and self.model.spec.engine == "vllm":
            raise ValueError(
                f"max_new_tokens={limit} is more than the {settings.max_new_tokens} that vllm is started for; give "
                f"GraceEncoder(..., max_new_tokens={limit})"
            )
        return Thinking(limit, settings.temperature if temperature is None else temperature, seed)

    def _shelf(self, thinking: Thinking | None) -> Shelf | None:
        if not self.store:
            return None
        return open_shelf(self.store, {"weights": self.revision, **self._sampling(thinking)}, self._pooling())

    def _render(self, texts: Sequence[str]) -> list[Prompt]:
        prompts = self.renderer.render([rationale_messages(text, self.settings.system_prompt) for text in texts])
        self.usage.shortened += sum(prompt.shortened for prompt in prompts)
        self.usage.empty_texts += sum(not prompt.text for prompt in prompts)
        return prompts

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _sampling(self, thinking: Thinking | None) -> dict[str, Any]:
        """What decides a rationale besides weights and prompt."""
        if thinking is None:
            return {"think": False}
        spec = self.model.spec
        engine = {"engine": spec.engine, "dtype": spec.dtype_name, **({"ignore_eos": True} if spec.ignore_eos else {})}
        return {"think": True, **engine, **asdict(thinking)}

    def _pooling(self) -> dict[str, Any]:
        """What decides a vector besides the rationale."""
        settings = self.settings
        return {"pooling": settings.pooling, "span": settings.span, "pool_system_prompt": settings.pool_system_prompt,
                "forward_dtype": self.model.spec.dtype_name}  # fmt: skip


def _finish_vectors(
    means: np.ndarray, normalize: bool, truncate_dim: int | None, precision: Precision, convert_to_tensor: bool
) -> Any:
    """Cut, scale and convert [N,H] float32 means; what is cut has unit length after the cut."""
    vectors = torch.from_numpy(means[:, :truncate_dim])
    vectors = unit(vectors) if normalize else vectors
    if precision == "float32":
        return vectors if convert_to_tensor else vectors.numpy()
    # Here, because the import takes seconds and few need it.
    from sentence_transformers.util import quantize_embeddings

    quantized = quantize_embeddings(vectors.numpy(), precision)
    return torch.from_numpy(quantized) if convert_to_tensor else quantized
