"""GraceEncoder: a model folder that turns texts into vectors, through rationales or without.

It renders, generates, packs and pools with the functions training uses, so that its vectors are those
that were rewarded. Argument names follow sentence-transformers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from verl.embedding.prompts import SYSTEM_PROMPT, Prompt, PromptRenderer, rationale_messages
from verl.models.packing import Row, pack
from verl.models.policy import PolicyModel, load_causal_lm
from verl.utils.seqlen_balancing import pack_rows
from verl.utils.tokenizer import load_tokenizer, stop_token_ids
from verl.workers.rollout.base import finish
from verl.workers.rollout.hf import HFRollout

# Tokens of one packed forward: large enough to keep two CPU cores busy, small enough for their caches.
_FORWARD_TOKENS = 2048
_DEFAULTS = {"system_prompt": SYSTEM_PROMPT, "pool_system_prompt": False, "max_prompt_length": 1024,
             "max_new_tokens": 2048, "truncation": "right", "temperature": 1.0}  # fmt: skip


class GraceEncoder:
    """Embeds texts with a causal language model.

    Args:
        path: a model folder; settings come from its embedder_config.json where there is one.
        device: auto, cuda or cpu.
        ignore_eos: write every rationale to its full length (a control for measurements).
    """

    def __init__(
        self, path: str, device: str = "auto", trust_remote_code: bool = False, ignore_eos: bool = False
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.settings = {**_DEFAULTS, **_read_settings(Path(path))}
        self.tokenizer = load_tokenizer(path, trust_remote_code)
        self.renderer = PromptRenderer(self.tokenizer, self.settings["max_prompt_length"], self.settings["truncation"])
        lm = load_causal_lm(path, trust_remote_code)
        if device == "cuda":
            lm = lm.to(device, torch.bfloat16)
        self.policy = PolicyModel(lm.eval().requires_grad_(False))
        self.rollout = HFRollout(
            lm,
            stop_token_ids(self.tokenizer, lm.config, lm.generation_config),
            max_num_seqs=10**9,
            ignore_eos=ignore_eos,
        )

    def encode(self, sentences: Sequence[str], **options: Any) -> np.ndarray:
        """[N,H] float32 unit vectors; options are those of `encode_with_rationales`."""
        return self.encode_with_rationales(sentences, **options)[0]

    def encode_with_rationales(
        self,
        sentences: Sequence[str],
        *,
        batch_size: int = 64,
        show_progress_bar: bool = False,
        think: bool = True,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int = 0,
    ) -> tuple[np.ndarray, list[str]]:
        """Embed texts, and return the rationales that their vectors were pooled over.

        Args:
            sentences: N texts; a text that occurs twice is embedded once.
            batch_size: texts generated at once.
            think: False embeds the prompt alone; the rationales are then empty.
            max_new_tokens, temperature: of the rationales; None = as in training.
            seed: of the sampling. A rationale depends on its batch too, so equal calls give equal vectors.

        Returns:
            [N,H] float32 unit vectors and N rationales.

        Raises:
            ValueError: an empty text.
        """
        texts = list(dict.fromkeys(sentences))
        prompts = self.renderer.render([rationale_messages(t, self.settings["system_prompt"]) for t in texts])
        order = sorted(range(len(texts)), key=lambda i: len(prompts[i].ids))
        vectors: dict[str, np.ndarray] = {}
        rationales: dict[str, str] = {}
        with Progress(disable=not show_progress_bar) as progress:
            task = progress.add_task("encoding", total=len(texts))
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                chosen = [prompts[i] for i in rows]
                responses = (
                    self._think(chosen, max_new_tokens, temperature, seed + start) if think else [[] for _ in rows]
                )
                for i, response, vector in zip(rows, responses, self._embed(chosen, responses), strict=True):
                    vectors[texts[i]] = vector
                    rationales[texts[i]] = self.tokenizer.decode(response, skip_special_tokens=True)
                progress.advance(task, len(rows))
        if not sentences:
            return np.zeros((0, self.policy.lm.config.get_text_config().hidden_size), np.float32), []
        return np.stack([vectors[s] for s in sentences]), [rationales[s] for s in sentences]

    def _think(
        self, prompts: list[Prompt], max_new_tokens: int | None, temperature: float | None, seed: int
    ) -> list[list[int]]:
        """Rationale ids of each prompt."""
        temperature = self.settings["temperature"] if temperature is None else temperature
        limit = self.settings["max_new_tokens"] if max_new_tokens is None else max_new_tokens
        generation = self.rollout.generate([p.ids for p in prompts], [temperature] * len(prompts), limit, seed)
        return [response.ids for response in finish(generation)]

    @torch.no_grad()
    def _embed(self, prompts: list[Prompt], responses: list[list[int]]) -> np.ndarray:
        """[N,H] vectors of prompts with their rationales, by the packed forward of training."""
        whole = self.settings["pool_system_prompt"]
        rows = [
            Row(tuple(p.ids), tuple(response), 0 if whole else p.text_start, scored=False)
            for p, response in zip(prompts, responses, strict=True)
        ]
        parts = pack_rows(
            [row.prompt for row in rows],
            [len(row.prompt) for row in rows],
            [len(row.response) for row in rows],
            _FORWARD_TOKENS,
        )
        vectors = np.zeros((len(rows), self.policy.lm.config.get_text_config().hidden_size), np.float32)
        for part in parts:
            packed = pack([rows[i] for i in part], self.policy.shares_prompts).to(self.policy.device)
            out = self.policy(packed, log_probs=False, embeddings=True)
            vectors[part] = out.embeddings.cpu().numpy()
        return vectors


def _read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a trained folder; a plain model has none and gets the defaults."""
    file = folder / "embedder_config.json"
    if not file.is_file():
        return {}
    return {name: value for name, value in json.loads(file.read_text()).items() if name in _DEFAULTS}
