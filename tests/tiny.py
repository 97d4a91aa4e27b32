"""A tiny random model and a byte tokenizer with a ChatML template, built by code, so that nothing is downloaded."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the three ChatML tokens; pad differs from eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = TEMPLATE
    return fast


def tiny_config(tie: bool = True, context: int = 4096, hidden_size: int = 64, llama: bool = False) -> Qwen2Config:
    """4 heads and 2 key-value heads. vLLM on a CPU supports heads of size 32 (hidden_size=128), not of size 16."""
    tokenizer = tiny_tokenizer()
    return (LlamaConfig if llama else Qwen2Config)(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=tie,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        # Large weights, so that the distributions of different tokens differ clearly.
        initializer_range=0.2,
    )


def tiny_model(tie: bool = True, seed: int = 0, hidden_size: int = 64, llama: bool = False) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = tiny_config(tie, hidden_size=hidden_size, llama=llama)
    return (LlamaForCausalLM if llama else Qwen2ForCausalLM)(config).eval()


def save_tiny(folder: Path, tie: bool = True, seed: int = 0, hidden_size: int = 64, llama: bool = False) -> Path:
    """Write a model folder that the programs can load."""
    tiny_model(tie, seed, hidden_size, llama).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
