"""Small models, as torchtitan's registries describe them."""

import dataclasses

from torchtitan.models import llama3, qwen3

VOCABULARY = 32


def spec(model="llama3", backend="varlen"):
    """A model of two layers of width 16."""
    dim, heads = 16, 2
    sizes = {"n_layers": 2, "dim": dim, "n_heads": heads, "n_kv_heads": 1, "attn_backend": backend}
    if model == "llama3":
        config = llama3.model_registry("debugmodel", attn_backend=backend)
        rope = llama3.ComplexRoPE.Config(dim=dim // heads, max_seq_len=64, theta=10000)
        made = llama3._build_llama3_layers(**sizes, hidden_dim=24, rope=rope)
    else:
        config = qwen3.model_registry("debugmodel", attn_backend=backend)
        rope = qwen3.CosSinRoPE.Config(dim=dim // heads, max_seq_len=64, theta=10000)
        made = qwen3._build_qwen3_layers(**sizes, hidden_dim=24, head_dim=dim // heads, rope=rope)
    init = llama3._output_linear_init(dim)
    m = config.model
    config.model = dataclasses.replace(
        m,
        dim=dim,
        vocab_size=VOCABULARY,
        layers=made,
        norm=dataclasses.replace(m.norm, normalized_shape=dim),
        tok_embeddings=dataclasses.replace(m.tok_embeddings, num_embeddings=VOCABULARY, embedding_dim=dim),
        lm_head=dataclasses.replace(m.lm_head, in_features=dim, out_features=VOCABULARY, param_init=init),
    )
    return config
