"""Copies transformers' Qwen3-MoE weights into full Megatron parameters, for parity tests."""

import torch


def full_from_hugging_face(hf_model) -> dict[str, torch.Tensor]:
    """Full parameters by global Megatron name (backend/model/parameters.py) of a Qwen3MoeForCausalLM."""
    config = hf_model.config
    state = hf_model.state_dict()
    full = {
        "embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": state["model.norm.weight"],
        "output_layer.weight": state["lm_head.weight"],
    }
    heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        attention = theirs + "self_attn."
        q = state[attention + "q_proj.weight"].view(groups, heads // groups, dim, -1)
        k = state[attention + "k_proj.weight"].view(groups, 1, dim, -1)
        v = state[attention + "v_proj.weight"].view(groups, 1, dim, -1)
        full[ours + "self_attention.linear_qkv.weight"] = torch.cat([q, k, v], 1).flatten(0, 2)
        full[ours + "self_attention.linear_proj.weight"] = state[attention + "o_proj.weight"]
        full[ours + "self_attention.q_layernorm.weight"] = state[attention + "q_norm.weight"]
        full[ours + "self_attention.k_layernorm.weight"] = state[attention + "k_norm.weight"]
        full[ours + "input_layernorm.weight"] = state[theirs + "input_layernorm.weight"]
        full[ours + "pre_mlp_layernorm.weight"] = state[theirs + "post_attention_layernorm.weight"]
        if layer in config.mlp_only_layers:
            gate, up = state[theirs + "mlp.gate_proj.weight"], state[theirs + "mlp.up_proj.weight"]
            full[ours + "mlp.linear_fc1.weight"] = torch.cat([gate, up])
            full[ours + "mlp.linear_fc2.weight"] = state[theirs + "mlp.down_proj.weight"]
            continue
        full[ours + "mlp.router.weight"] = state[theirs + "mlp.gate.weight"]
        for expert in range(config.num_experts):
            name = f"{ours}mlp.experts.{expert}."
            full[name + "linear_fc1.weight"] = state[theirs + "mlp.experts.gate_up_proj"][expert]
            full[name + "linear_fc2.weight"] = state[theirs + "mlp.experts.down_proj"][expert]
    return full
