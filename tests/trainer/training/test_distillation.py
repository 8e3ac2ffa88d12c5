import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from trainer.training.distillation import TEMPERATURE, Teacher, answers_of, difference, token_logits


class Linear(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(4, 3)

    def forward(self, x, labels=None):
        return {"logits": self.layer(x)}


def batch():
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(8, 4, generator=generator), "labels": torch.arange(8) % 3}


def test_the_loss_is_torchs_own_divergence_mixed_in():
    teacher, student, data = Linear(0), Linear(1), batch()
    logits = student(**data)["logits"]
    own = functional.cross_entropy(logits, data["labels"])
    softer, reference = (logits / TEMPERATURE).log_softmax(1), (teacher(**data)["logits"] / TEMPERATURE).log_softmax(1)
    wanted = TEMPERATURE**2 * functional.kl_div(softer, reference, reduction="batchmean", log_target=True)
    got = Teacher(teacher, 0.25).loss(own, logits, data, None)
    torch.testing.assert_close(got, 0.75 * own + 0.25 * wanted)
    # Two accumulated halves count all eight examples.
    halves = [{name: value[part] for name, value in data.items()} for part in (slice(0, 3), slice(3, 8))]
    taught = Teacher(teacher, 1.0)
    parts = [taught.loss(torch.tensor(0.0), student(**half)["logits"], half, 8) for half in halves]
    torch.testing.assert_close(sum(parts), wanted)


def test_the_teacher_never_changes_and_its_twin_has_nothing_to_learn():
    student, data = Linear(0), batch()
    taught = Teacher(copy.deepcopy(student), 1.0)
    before = copy.deepcopy(taught.model.state_dict())
    loss = taught.loss(torch.tensor(0.0), student(**data)["logits"], data, None)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    assert student.layer.weight.grad.abs().max() < 1e-7
    assert all(parameter.grad is None for parameter in taught.model.parameters())
    assert all(torch.equal(before[name], value) for name, value in taught.model.state_dict().items())


@pytest.mark.parametrize("share", [-1, 1.5])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        Teacher(Linear(0), share)


def test_token_answers_leave_padding_out_and_are_compared_by_torchs_divergence():
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    text = {"labels": torch.ones(2, 5, dtype=torch.long), "attention_mask": mask}
    reference, now = (answers_of({"logits": logits}, text) for logits in (before, after))
    assert [tuple(rows.shape) for rows in reference] == [(5, 7), (2, 7)]
    wanted = [
        functional.kl_div(after[row, :count].log_softmax(-1), before[row, :count].softmax(-1), reduction="batchmean")
        for row, count in ((0, 5), (1, 2))
    ]
    torch.testing.assert_close(difference(reference, now), torch.stack(wanted))
    torch.testing.assert_close(difference(now, now), torch.zeros(2))


def test_labels_say_what_counts_where_the_mask_is_of_another_text():
    """A summary's attention mask is that of the article."""
    labels = torch.tensor([[3, 4, -100], [5, -100, -100]])
    rows = token_logits({"logits": torch.randn(2, 3, 9)}, {"labels": labels, "attention_mask": torch.ones(2, 8)})
    assert [len(row) for row in rows] == [2, 1]


@pytest.mark.parametrize(
    "labels", [torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), None], ids=["maps", "classes", "none"]
)
def test_other_outputs_of_three_dimensions_are_no_tokens(labels):
    batch = {} if labels is None else {"labels": labels}
    assert token_logits({"logits": torch.randn(2, 5, 7)}, batch) is None
