"""Tiny random models of every family, with the settings that make it what it is."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BOTH = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_local_experts": 4}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [4.0, 5.0, 6.0, 7.0],
}  # fmt: skip
# What makes each family what it is: windows shorter than the rows, caps and multipliers far from 1, dropout.
SETTINGS: dict[str, dict] = {
    "qwen2": {"use_sliding_window": True, **BOTH},
    "qwen3": {"head_dim": 16},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**EXPERTS, "head_dim": 16},
    "llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 16}, "attention_dropout": 0.2},
    "mistral": {"sliding_window": 6, "head_dim": 8},
    "mixtral": EXPERTS,
    "phi": {"partial_rotary_factor": 0.5, "resid_pdrop": 0.2, "embd_pdrop": 0.2},
    "phi3": {"sliding_window": 7, "resid_pdrop": 0.2, "rope_parameters": LONGROPE,
             "original_max_position_embeddings": 64},
    "gemma": {"head_dim": 8},
    "gemma2": {**BOTH, **CAPS, "attention_dropout": 0.2},
    "gemma3_text": {**BOTH, **CAPS},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3,
                "logits_scaling": 4.0, "attention_dropout": 0.2},
    "granitemoe": {**EXPERTS, "logits_scaling": 4.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.3},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.25, **BOTH},
    "gpt2": {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2},
    "gpt_neox": {"hidden_dropout": 0.2, "attention_dropout": 0.2},
    "olmo": {"clip_qkv": 2.0},
    "olmo2": {},
    "olmo3": BOTH,
    "olmoe": EXPERTS,
    "smollm3": {"no_rope_layers": [1, 0], "use_sliding_window": True, **BOTH},
    "deepseek_v3": {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
                    "qk_nope_head_dim": 8, "v_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2,
                    "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
                    "n_shared_experts": 1},
    "exaone4": BOTH,
    "glm4": {"head_dim": 8, "attention_dropout": 0.2},
    "ministral3": {"head_dim": 8},
    "starcoder2": {"sliding_window": 6, "residual_dropout": 0.2, "embedding_dropout": 0.2},
}  # fmt: skip


def tiny(folder: Path, family: str, **changes):
    """A random model of a family with transformers' plain attention, saved in `folder`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | SETTINGS.get(family, {}) | changes)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    lm.save_pretrained(folder)
    return lm
