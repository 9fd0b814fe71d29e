"""The loss in blocks of rows equals the loss over all logits, and so do its gradients."""

import pytest
import torch
from torch.nn import functional as F

from gpt2_model.cpu.training import ROWS, head_loss


def both(rows, *, ignored=0, autocast=False, words=500):
    torch.manual_seed(0)
    targets = torch.randint(0, words, (rows,))
    targets[:ignored] = -100
    hidden, weight = torch.randn(rows, 24), torch.randn(words, 24)
    found = []
    for loss_of in (head_loss, lambda h, w, t: F.cross_entropy(F.linear(h, w).float(), t)):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(*leaves, targets)
        (3 * loss).backward()
        found.append((loss.detach(), leaves[0].grad, leaves[1].grad))
    return zip(*found, strict=True)


@pytest.mark.parametrize(("rows", "ignored"), [(1, 0), (ROWS - 1, 0), (ROWS, 7), (2 * ROWS + 3, ROWS + 1)])
def test_equal_to_cross_entropy(rows, ignored) -> None:
    for ours, expected in both(rows, ignored=ignored):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("words", [500, 512])
def test_equal_under_autocast_to_bf16_s_precision(words) -> None:
    """A vocabulary that is padded, and one that needs no padding."""
    for ours, expected in both(ROWS + 1, autocast=True, words=words):
        assert ours.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=0.02, atol=2e-3)


def test_a_weight_in_bf16_has_its_gradient_summed_in_fp32() -> None:
    """Of eight blocks: within one rounding to bf16, 1/256, of the sum of the same products."""
    torch.manual_seed(0)
    rows, classes, width = 8 * ROWS, 11, 8
    hidden, weight = torch.randn(rows, width).bfloat16(), torch.randn(classes, width).bfloat16().requires_grad_()
    targets = torch.randint(0, classes, (rows,))
    head_loss(hidden, weight, targets).backward()
    logits = (hidden @ weight.detach().t()).float()
    logits_grad = (logits.softmax(-1) - F.one_hot(targets, classes)) / rows
    parts = [g.t() @ h for g, h in zip(logits_grad.bfloat16().split(ROWS), hidden.split(ROWS), strict=True)]
    expected = torch.stack([part.float() for part in parts]).sum(0)
    assert weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad.float(), expected, rtol=1 / 256, atol=1e-6)


def test_large_logits_do_not_overflow() -> None:
    loss = head_loss(torch.full((2, 1), 1e4), torch.tensor([[1.0], [0.0]]), torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(5e3)


def test_nothing_is_kept_without_gradients() -> None:
    with torch.no_grad():
        assert not head_loss(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])).requires_grad


def test_targets_that_no_mean_can_be_taken_of() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(7, 4)
    with pytest.raises(ValueError, match="no rows"):
        head_loss(hidden[:0], weight, torch.empty(0, dtype=torch.long))
    for target in (-5, 7):  # as F.cross_entropy, which lets -100 pass alone
        with pytest.raises(RuntimeError, match=f"index {target} is out of bounds"):
            head_loss(hidden, weight, torch.tensor([1, target, 2]))
    assert torch.isnan(head_loss(hidden, weight, torch.tensor([-100] * 3)))
