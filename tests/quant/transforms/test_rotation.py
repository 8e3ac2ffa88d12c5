"""Rotation: float models compute the same, activations lose their outliers, and what cannot be rotated is refused."""

import json
from dataclasses import asdict

import pytest
import torch
import transformers
from torch import nn

from quant.errors import UserError
from quant.transforms.migration import Migration, added, attach
from quant.transforms.rotation import hadamard, multiply, random_rotation, rotate
from quant.transforms.unfold import unfold

SHAPE = {
    **{"vocab_size": 60, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    **{"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
MODELS = {
    "llama": ("Llama", {}),
    "llama, grouped queries, tied": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral, eager attention": ("Mistral", {"num_key_value_heads": 2, "attn_implementation": "eager"}),
    "qwen2, biases, tied": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3, norms of queries": ("Qwen3", {"head_dim": 16, "num_key_value_heads": 2}),
    "gemma, 1 + weight, scaled embedding": ("Gemma", {"head_dim": 12, "num_key_value_heads": 4}),
    "granite, scaled residuals": ("Granite", {"residual_multiplier": 0.3, "embedding_multiplier": 3.0}),
    "gpt2, LayerNorm, Conv1D, tied": ("GPT2", {}),
    "opt, LayerNorm, biases": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 48}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_key_value_heads": 2}),
    "qwen2-moe": ("Qwen2Moe", {"num_key_value_heads": 2, "shared_expert_intermediate_size": 16, **EXPERTS}),
    "gpt-oss": ("GptOss", {"num_key_value_heads": 2, "num_local_experts": 4, "head_dim": 12}),
}


def build(name, more):
    """An untrained decoder whose norms and biases are not trivial, and a batch."""
    torch.manual_seed(0)
    own = dict(more)
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **own})
    config._attn_implementation = own.get("attn_implementation", "sdpa" if name != "GptOss" else "eager")
    kind = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = unfold(getattr(transformers, name + kind)(config).eval())
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            if parameter.dim() == 1 or place.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.5)
    return model, {"input_ids": torch.randint(3, 60, (2, 9))}


@pytest.mark.parametrize("case", MODELS)
def test_a_rotated_decoder_computes_the_same_from_other_weights(case):
    model, batch = build(*MODELS[case])
    before = model(**batch).logits
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters() if "weight" in name}
    weights = {name: weight for name, weight in weights.items() if weight.dim() > 1}
    notes = rotate(model, batch, seed=3)
    after = model(**batch).logits
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    now = dict(model.named_parameters())
    same = [name for name, weight in weights.items() if torch.allclose(weight, now[name], atol=1e-3)]
    assert not same, same
    assert any("no longer tied" in note for note in notes) == (model.config.tie_word_embeddings is False and tied(case))
    assert any("values" in note for note in notes) == (case == "gpt2, LayerNorm, Conv1D, tied")


def tied(case):
    return "tied" in case or case.startswith(("gemma", "opt"))


def test_longer_texts_and_a_cache_come_out_the_same_as_before():
    model, batch = build("Llama", {"num_key_value_heads": 2})
    longer = {"input_ids": torch.randint(3, 60, (1, 23))}
    before, written = model(**longer).logits, model.generate(**longer, max_new_tokens=8, do_sample=False)
    rotate(model, batch)
    torch.testing.assert_close(model(**longer).logits, before, rtol=0, atol=1e-5)
    assert model.generate(**longer, max_new_tokens=8, do_sample=False).tolist() == written.tolist()


def test_outlier_channels_of_the_stream_are_spread():
    model, batch = build("Llama", {})
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] *= 100
    reads = {}
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: reads.update(now=args[0]))

    def ratio():
        with torch.no_grad():
            model(**batch)
        return float(reads["now"].abs().amax() / reads["now"].square().mean().sqrt())

    before = ratio()
    rotate(model, batch)
    assert before > 6 and ratio() < 3  # one large entry: after a Hadamard matrix, all entries are about as large


def test_a_head_stays_tied_where_the_norm_before_it_has_one_gain():
    model, batch = build("Llama", {"tie_word_embeddings": True})
    model.model.norm.weight.data.fill_(0.7)
    before = model(**batch).logits
    assert rotate(model, batch) == []
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=1e-5)


def test_a_saved_rotation_loads_into_a_model_that_ties_its_head():
    model, batch = build("Llama", {"tie_word_embeddings": True})
    rotate(model, batch)
    saved = json.loads(json.dumps(asdict(added(model))))
    assert saved["untied"] == ["lm_head"] and not Migration(**saved).factors
    fresh, _ = build("Llama", {"tie_word_embeddings": True})
    attach(fresh, Migration(**saved))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)
    assert added(fresh) == Migration(**saved) and not fresh.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_outliers_in_bfloat16_do_not_hide_what_kind_a_norm_is(name):
    model, batch = build(name, {})
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table[:, 7] *= 300
    model = model.bfloat16()
    before = model(**batch).logits.float()
    rotate(model, batch)
    assert (model(**batch).logits.float() - before).abs().max() < 0.1 * before.abs().max()


def test_seeds_decide_the_rotation():
    weights = []
    for seed in (0, 0, 1):
        model, batch = build("Llama", {})
        rotate(model, batch, seed)
        weights.append(model.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2], atol=1e-3)


def test_a_width_without_a_hadamard_matrix_gets_a_random_rotation_and_says_so():
    model, batch = build("Llama", {"hidden_size": 44, "num_attention_heads": 2, "head_dim": 22})
    assert hadamard(44) is not None and hadamard(46) is None
    model, batch = build("Llama", {"hidden_size": 46, "num_attention_heads": 1, "num_key_value_heads": 1})
    before = model(**batch).logits
    (note,) = rotate(model, batch)
    assert "no Hadamard matrix of 46 rows" in note
    torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "more", "why"),
    [
        ("Gemma2", {"head_dim": 12, "num_key_value_heads": 4}, "adds the output of the Gemma2RMSNorm"),
        ("Bert", {"is_decoder": True}, "reads the output of its norm bert.embeddings.LayerNorm with more than layers"),
    ],
)
def test_models_that_no_rotation_passes_are_refused_unchanged(name, more, why):
    torch.manual_seed(0)
    kind = "LMHeadModel" if name == "Bert" else "ForCausalLM"
    model = getattr(transformers, name + kind)(getattr(transformers, f"{name}Config")(**SHAPE, **more)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=why) as error:
        rotate(model, {"input_ids": torch.randint(3, 60, (2, 9))})
    assert str(error.value).startswith("--rotate: ") and "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Idle(nn.Module):
    """An embedding, a norm and two layers of which one runs only for long texts."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(10, 8), nn.RMSNorm(8)
        self.short, self.long, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids):
        x = self.table(ids)
        x = x + (self.long if ids.shape[1] > 4 else self.short)(self.norm(x))
        return self.head(self.norm(x))


def test_layers_that_the_example_does_not_reach_are_refused():
    with pytest.raises(UserError, match="does not call its layer long"):
        rotate(Idle(), torch.randint(0, 10, (1, 3)))
    with pytest.raises(UserError, match="no residual stream"):
        rotate(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 36, 64, 80, 96, 128, 576, 768, 896])
def test_hadamard_matrices_have_orthogonal_rows_of_ones(size):
    matrix = hadamard(size)
    assert matrix.abs().eq(1).all() and torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


def test_powers_of_two_are_scipys_and_odd_sizes_have_none():
    from scipy.linalg import hadamard as of_scipy

    assert hadamard(32).tolist() == of_scipy(32).tolist()
    assert [hadamard(size) for size in (3, 6, 9, 50)] == [None] * 4


@pytest.mark.parametrize("size", [12, 13])
@pytest.mark.parametrize("keeps_mean", [False, True])
def test_rotations_are_orthogonal_and_keep_the_mean_where_asked(size, keeps_mean):
    matrix, exact = random_rotation(size, torch.Generator().manual_seed(0), keeps_mean=keeps_mean)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    assert exact == (size == 12)
    assert torch.allclose(matrix.sum(0), torch.ones(size, dtype=torch.float64)) == keeps_mean


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_multiplying_along_an_axis_is_the_einsum(axis, monkeypatch):
    monkeypatch.setattr("quant.transforms.rotation.CHUNK", 16)
    weight, matrix = torch.randn(4, 8, 12), torch.randn(4, 4, dtype=torch.float64)
    gain = torch.randn(weight.shape[axis], dtype=torch.float64)
    runs = (weight.movedim(axis, -1).double() * gain).unflatten(-1, (-1, 4))
    expected = torch.einsum("...gj,ij->...gi", runs, matrix).flatten(-2).movedim(-1, axis)
    multiply(weight, axis, matrix, gain)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-6)
