"""The experts of a mixture are found, stacked in tensors or in a list, in every family."""

import pytest
import torch
import transformers
from torch import nn

from eval.layers.experts import expert_groups
from quant.convert import find_layers
from quant.transforms.unfold import unfold

SHAPE = {
    **{"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    **{"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
FAMILIES = {
    "Mixtral": {"num_local_experts": 4, "num_key_value_heads": 2},
    "Qwen2Moe": {"num_key_value_heads": 2, "shared_expert_intermediate_size": 16, **EXPERTS},
    "Qwen3Moe": {"num_key_value_heads": 2, "head_dim": 8, **EXPERTS},
    "Olmoe": EXPERTS,
    "GptOss": {"num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 8},
    "Phimoe": {"num_local_experts": 4},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": {
        **{"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        **{"first_k_dense_replace": 0, "n_shared_experts": 1, **LATENT},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_experts_of_each_family_are_layers_and_one_group_a_block(family):
    with torch.device("meta"):
        config = getattr(transformers, f"{family}Config")(**SHAPE, **FAMILIES[family])
        model = unfold(getattr(transformers, f"{family}ForCausalLM")(config))
    layers = find_layers(model)
    groups = expert_groups(model, layers)
    assert len(groups) == 2
    for block, group in enumerate(groups):
        assert [name.rpartition(".")[2] for name in group] == ["gate_up_proj", "down_proj"]
        assert all(f"layers.{block}." in name and ".experts." in name for name in group)
        assert all(layers[name].experts == 4 for name in group)
    assert not any("shared" in name for group in groups for name in group)


class Expert(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.w1, self.w2 = nn.Linear(8, width, bias=False), nn.Linear(width, 8, bias=False)


class Mixture(nn.Module):
    """Experts in a list, as models with code of their own have them; w1 and w2 of each are layers."""

    def __init__(self, widths, routes):
        super().__init__()
        self.router, self.mlps = nn.Linear(8, routes, bias=False), nn.ModuleList(Expert(width) for width in widths)


@pytest.mark.parametrize(
    ("widths", "routes", "found"), [([6, 6, 6], 3, True), ([6, 6, 6], 5, False), ([6, 6, 4], 3, False), ([6], 1, False)]
)
def test_a_list_of_networks_that_are_alike_behind_a_router_of_as_many_outputs_is_a_mixture(widths, routes, found):
    model = nn.Sequential(nn.Linear(8, 8), Mixture(widths, routes))
    names = [f"1.mlps.{index}.{layer}" for index in range(len(widths)) for layer in ("w1", "w2")]
    assert expert_groups(model, find_layers(model)) == ([names] if found else [])
    assert expert_groups(model, ["0"]) == []


def test_blocks_of_a_transformer_are_no_experts():
    config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=2, n_positions=2)
    model = transformers.GPT2LMHeadModel(config)
    assert expert_groups(model, find_layers(model)) == []
