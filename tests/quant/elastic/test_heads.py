"""Heads of attentions: found where each has its own part of separate projections, and cut without a trace."""

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from quant.elastic import ElasticNet
from quant.elastic.heads import find_heads

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}
TOKENS = {"input_ids": torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(0))}


def bert(implementation="sdpa"):
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, attn_implementation=implementation)).eval()


def test_query_key_value_and_output_of_each_attention_belong_together():
    for model in (bert(), bert("eager")):
        first, second = find_heads(model, TOKENS)
        place = "bert.encoder.layer.1.attention"
        assert second.writers == [f"{place}.self.{part}" for part in ("query", "key", "value")]
        assert second.readers == [f"{place}.output.dense"] and (second.size, second.unit) == (32, 8)
        assert "layer.0" in first.writers[0]


def test_a_model_with_fewer_heads_and_blocks_is_plain_and_computes_the_same():
    model = bert()
    before = model(**TOKENS).logits
    net = ElasticNet(model, TOKENS, widths=(0.25, 0.5, 1), depths=(1,))
    torch.testing.assert_close(model(**TOKENS).logits, before, rtol=1e-4, atol=1e-5)
    kinds = [decision.kind for decision in net.decisions]
    assert kinds.count("heads") == 2 and kinds.count("depth") == 1
    assert net.describe([0] * len(kinds))["bert.encoder.layer.0.attention.self.query heads"] == "1 of 4 heads"
    net.set([1] * len(kinds))
    expected = model(**TOKENS).logits
    assert not torch.allclose(expected, before)
    plain = net.extract([1] * len(kinds))
    torch.testing.assert_close(plain(**TOKENS).logits, expected, rtol=0, atol=0)
    assert plain.bert.encoder.layer[0].attention.self.query.weight.shape == (16, 32)


def test_widths_that_no_searched_layer_has_stay():
    layers = [f"bert.encoder.layer.{n}.intermediate.dense" for n in range(2)]
    net = ElasticNet(bert(), TOKENS, widths=(0.5, 1), layers=layers)
    assert [decision.name for decision in net.decisions] == layers


def test_heads_that_share_keys_or_one_projection_stay_whole():
    grouped = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()
    assert find_heads(grouped, TOKENS) == []

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

        def forward(self, x):
            q, k, v = self.qkv(x).view(len(x), -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(mixed.transpose(1, 2).reshape(x.shape))

    assert find_heads(Fused(), torch.randn(2, 5, 32)) == []
