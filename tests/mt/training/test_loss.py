from __future__ import annotations

import pytest
import torch

from nspec.mt.training.loss import label_smoothed_loss, token_losses


def batch(tokens: int = 13, vocabulary: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, tokens, vocabulary, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, vocabulary, (2, tokens), generator=generator)
    labels[1, tokens // 2 :] = -100
    return logits, labels


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.6])
def test_the_loss_is_the_formula_over_real_tokens(epsilon: float) -> None:
    logits, labels = batch()
    expected = 0.0
    for row, label in zip(logits.reshape(-1, 17), labels.reshape(-1).tolist()):
        if label != -100:
            cost = row.exp().sum().log() - row
            expected += float((1 - epsilon) * cost[label] + epsilon * cost.mean())
    assert label_smoothed_loss(logits, labels, epsilon, 7).item() == pytest.approx(expected / 7, rel=1e-12)


def test_smoothing_equals_fairseqs_with_its_epsilon_scaled_to_the_others() -> None:
    logits, labels = batch()
    fairseq = 0.1
    costs = -logits.log_softmax(-1)[labels != -100]
    real = labels[labels != -100]
    share = fairseq / (costs.shape[1] - 1)
    nll = costs[torch.arange(len(real)), real]
    theirs = ((1 - fairseq - share) * nll + share * costs.sum(-1)).sum()
    ours = label_smoothed_loss(logits, labels, fairseq * 17 / 16, 1)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)


def test_half_precision_logits_are_computed_in_float32() -> None:
    logits, labels = batch()
    half = logits.bfloat16()
    loss = label_smoothed_loss(half, labels, 0.1, 20)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(label_smoothed_loss(half.double(), labels, 0.1, 20).item(), rel=1e-6)


def test_micro_batches_normalised_by_the_window_give_the_gradient_of_one_batch() -> None:
    logits, labels = batch()
    whole = logits.clone().requires_grad_()
    items = int(labels.ne(-100).sum())
    label_smoothed_loss(whole, labels, 0.1, items).backward()
    parts = logits.clone().requires_grad_()
    for i in range(2):
        label_smoothed_loss(parts[i], labels[i], 0.1, torch.tensor(float(items))).backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-12, atol=0)


def test_validation_losses_have_no_smoothing_and_count_only_real_tokens() -> None:
    logits, labels = batch()
    total, tokens = token_losses(logits, labels)
    assert tokens.item() == 13 + 6
    assert total.item() == pytest.approx(label_smoothed_loss(logits.float(), labels, 0.0, 1).item(), rel=1e-6)
