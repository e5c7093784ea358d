"""transformers' language models with Mamba's and Mamba-2's mixers, and decoders of softmax attention, all tiny."""

import torch

VOCABULARY = 41
_HYBRID = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 3, "mamba_chunk_size": 4}
_PLAIN = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 3}

# Zamba2's own forward of 4.57 adds up its chunks wrongly on a CPU, so that it has one here
CONFIGS = {
    "Mamba": {**_PLAIN, "time_step_rank": 2, "use_bias": True},
    "FalconMamba": {**_PLAIN, "time_step_rank": 2},
    "Jamba": {
        **_HYBRID, "num_hidden_layers": 4, "mamba_d_state": 3, "mamba_dt_rank": 2, "attn_layer_period": 2,
        "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1, "use_mamba_kernels": False,
    },
    "Zamba": {
        **_HYBRID, "num_key_value_heads": 2, "num_hidden_layers": 6, "mamba_d_state": 3, "mamba_dt_rank": 2,
        "n_mamba_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
    },
    "Mamba2": {**_PLAIN, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
    "Bamba": {**_HYBRID, **_MAMBA2, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    "Zamba2": {
        "hidden_size": 16, "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"],
        "mamba_d_state": 3, "mamba_ngroups": 2, "n_mamba_heads": 4, "chunk_size": 16, "intermediate_size": 24,
        "num_attention_heads": 2, "use_mamba_kernels": False,
    },
    "NemotronH": {
        "hidden_size": 16, "layers_block_type": ["mamba", "attention", "mamba", "mlp"], "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24, "ssm_state_size": 3, "mamba_num_heads": 4,
        "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 4, "use_mamba_kernels": False,
    },
    "GraniteMoeHybrid": {
        **_HYBRID, **_MAMBA2, "num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 8, "attention_multiplier": 0.3,
    },
    "FalconH1": {
        **_HYBRID, **_MAMBA2, "num_hidden_layers": 2, "mamba_d_ssm": 32, "mamba_rms_norm": True,
        "mamba_norm_before_gate": False, "ssm_in_multiplier": 1.3, "ssm_multipliers": [0.7, 1.1, 1.2, 0.9, 1.4],
        "head_dim": 8,
    },
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "GPTNeoX": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
    "Llama": {**_HYBRID, "num_hidden_layers": 2},
}  # fmt: skip
SCANS = (
    "Mamba",
    "FalconMamba",
    "Jamba",
    "Zamba",
    "Mamba2",
    "Bamba",
    "Zamba2",
    "NemotronH",
    "GraniteMoeHybrid",
    "FalconH1",
)
HYBRIDS = tuple(name for name in SCANS if name not in ("Mamba", "FalconMamba", "Mamba2"))
_CLASSES = {"GPT2": "GPT2LMHeadModel"}
DECODERS = ("GPT2", "GPTNeoX", "Llama")


def build(name, **options):
    """A causal language model with random weights, far from those that make every matrix alike."""
    import transformers

    kind = getattr(transformers, f"{name}Config", None)
    if kind is None:
        return None  # a family that this version does not have
    attention = {"attn_implementation": options.pop("attention")} if "attention" in options else {}
    config = kind(**{**CONFIGS[name], "vocab_size": VOCABULARY, "pad_token_id": 0, **options}, **attention)
    torch.manual_seed(0)
    model = getattr(transformers, _CLASSES.get(name, f"{name}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for label, value in model.named_parameters():
            if label.endswith(("dt_bias", "dt_proj.bias", "dt_proj_bias")):
                value.add_(1)
            elif "A_log" not in label:
                value.add_(0.1 * torch.randn(value.shape))
    return model


def quiet():
    """No warnings of what is missing for fast paths."""
    import transformers

    transformers.logging.set_verbosity_error()


def texts(padding="none", tokens=11):
    """Ids of two texts, and a mask in which the second has four tokens of padding."""
    ids = torch.randint(1, VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, tokens, dtype=torch.long)
    if padding != "none":
        mask[1, :4] = 0
    return ids, mask.flip(1) if padding == "right" else mask
