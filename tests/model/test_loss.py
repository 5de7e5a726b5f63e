"""The chunked loss of D+1 heads against naive formulas, and its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model.model_cases import max_difference
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from dist_mtp.model.loss import IGNORE, head_stats, linear_cross_entropy

VOCAB, WIDTH, POSITIONS = 1009, 16, 23


def case(
    depth: int, ignored: str = "some", dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], nn.Parameter, Tensor, list[float]]:
    """Hidden states, head weight, targets and coefficients of D+1 heads."""
    generator = torch.Generator().manual_seed(depth)
    hiddens = [torch.randn(POSITIONS, WIDTH, generator=generator, dtype=dtype) for _ in range(depth + 1)]
    weight = nn.Parameter(torch.randn(VOCAB, WIDTH, generator=generator, dtype=dtype))
    targets = torch.randint(VOCAB, (depth + 1, POSITIONS), generator=generator)
    if ignored != "none":
        targets[torch.rand(targets.shape, generator=generator) < (1.1 if ignored == "all" else 0.3)] = IGNORE
    return [h.requires_grad_() for h in hiddens], weight, targets, [1 / 3, 0.1, 0.07, 0.03][: depth + 1]


def naive(
    hiddens: list[Tensor], weight: Tensor, targets: Tensor, coefficients: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, losses per position and argmaxes by whole logits and ``log_softmax``."""
    losses, argmaxes = [], []
    for hidden, target in zip(hiddens, targets, strict=True):
        log_probabilities = (hidden @ weight.t()).log_softmax(dim=1)
        picked = -log_probabilities.gather(1, target.clamp_min(0)[:, None])[:, 0]
        losses.append(torch.where(target == IGNORE, torch.zeros_like(picked), picked))
        argmaxes.append(log_probabilities.argmax(dim=1))
    loss = sum((c * each.sum() for c, each in zip(coefficients, losses, strict=True)), torch.zeros(()))
    return loss, torch.stack(losses), torch.stack(argmaxes)


def take_gradients(hiddens: list[Tensor], weight: Tensor) -> list[Tensor]:
    grads = [t.grad for t in (*hiddens, weight)]
    assert all(g is not None for g in grads), f"no gradient: {grads}"
    for tensor in (*hiddens, weight):
        tensor.grad = None
    return [g for g in grads if g is not None]


class TestLinearCrossEntropy:
    """Loss, losses per position, argmaxes and all gradients equal those of whole logits, whatever the chunk.

    A breach: a position counted twice or not at all at a chunk's edge, or an ignored target that pulls.
    """

    @pytest.mark.parametrize("depth", range(4))
    @pytest.mark.parametrize("chunk", [1, 7, 10**6])
    @pytest.mark.parametrize("ignored", ["none", "some", "all"])
    @pytest.mark.parametrize("in_forward", [False, True])
    def test_equals_naive(self, depth: int, chunk: int, ignored: str, in_forward: bool) -> None:
        hiddens, weight, targets, coefficients = case(depth, ignored)
        expected_loss, expected_losses, expected_argmaxes = naive(hiddens, weight, targets, coefficients)
        expected_loss.backward()
        expected = take_gradients(hiddens, weight)
        loss, losses, argmaxes = linear_cross_entropy(
            hiddens, weight, targets, coefficients, chunk=chunk, accumulate_in_forward=in_forward
        )
        assert (weight.grad is not None) == in_forward, "the weight gradient came at the wrong time"
        loss.backward()
        assert max_difference(loss, expected_loss) < 1e-12, f"{loss.item()} != {expected_loss.item()}"
        assert max_difference(losses, expected_losses) < 1e-12, f"{losses} != {expected_losses}"
        assert torch.equal(argmaxes, expected_argmaxes), f"{argmaxes} != {expected_argmaxes}"
        names = [*(f"hidden {d}" for d in range(depth + 1)), "weight"]
        for name, found, wanted in zip(names, take_gradients(hiddens, weight), expected, strict=True):
            difference = max_difference(found, wanted)
            assert difference < 1e-13, f"{name}: differ by {difference}: {found} != {wanted}"
        if ignored == "all":
            assert loss.item() == 0, f"{loss.item()} != 0"

    def test_accumulating_in_the_forward_adds_to_what_is_there(self) -> None:
        """Two microbatches add up, in ``.grad`` or in ``main_grad`` where mixed precision keeps one."""
        hiddens, weight, targets, coefficients = case(1)
        expected = torch.zeros_like(weight)
        for scale in (1.0, 2.0):
            naive([h.detach() * scale for h in hiddens], weight, targets, coefficients)[0].backward()
            expected += take_gradients([], weight)[0]
        main_grad = torch.zeros_like(weight)
        for name in ("grad", "main_grad"):
            if name == "main_grad":
                weight.main_grad = main_grad
            for scale in (1.0, 2.0):
                scaled = [(h.detach() * scale).requires_grad_() for h in hiddens]
                linear_cross_entropy(scaled, weight, targets, coefficients, chunk=7, accumulate_in_forward=True)
            found = main_grad if name == "main_grad" else take_gradients([], weight)[0]
            assert max_difference(found, expected) < 1e-13, f"{name}: {found} != {expected}"
        assert weight.grad is None, "main_grad takes the place of .grad"

    @pytest.mark.parametrize("scale", [0.0, -2.5, 1024.0])
    def test_gradient_scale(self, scale: float) -> None:
        """The gradients follow the gradient of the loss."""
        hiddens, weight, targets, coefficients = case(2)
        (naive(hiddens, weight, targets, coefficients)[0] * scale).backward()
        expected = take_gradients(hiddens, weight)
        (linear_cross_entropy(hiddens, weight, targets, coefficients, chunk=7)[0] * scale).backward()
        for found, wanted in zip(take_gradients(hiddens, weight), expected, strict=True):
            assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12), f"{found} != {wanted}"

    def test_bf16(self) -> None:
        """Logits are rounded to bf16, everything after them is fp32: losses within bf16's rounding of the logits."""
        hiddens, weight, targets, coefficients = case(1, dtype=torch.bfloat16)
        loss, losses, _ = linear_cross_entropy(hiddens, weight, targets, coefficients, chunk=7)
        loss.backward()
        _, expected, _ = naive([h.detach().double() for h in hiddens], weight.double(), targets, coefficients)
        assert losses.dtype == torch.float32, f"{losses.dtype} != float32"
        assert max_difference(losses, expected) < 0.1, f"{losses} != {expected}"
        found = take_gradients(hiddens, weight)
        assert {g.dtype for g in found} == {torch.bfloat16}

    def test_extreme_logits(self) -> None:
        """Logits of +-1e4 neither overflow nor give NaN."""
        weight = nn.Parameter(torch.tensor([[1e4], [-1e4], [0.0]]))
        hidden = torch.tensor([[1.0], [-1.0]], requires_grad=True)
        loss, losses, _ = linear_cross_entropy([hidden], weight, torch.tensor([[0, 0]]), [1.0], chunk=1)
        loss.backward()
        assert losses.tolist() == [[0.0, 2e4]], f"{losses.tolist()} != [[0, 20000]]"
        assert hidden.grad is not None
        assert hidden.grad.tolist() == [[0.0], [-2e4]], f"{hidden.grad.tolist()} != [[0], [-20000]]"

    @pytest.mark.parametrize("in_forward", [False, True])
    def test_evaluation_computes_no_gradient(self, in_forward: bool) -> None:
        """Under ``no_grad`` the weight gets no gradient, and no product beside the logits is computed."""
        hiddens, weight, targets, coefficients = case(1)
        with torch.no_grad(), WideTensors() as seen:
            loss, _, _ = linear_cross_entropy(
                hiddens, weight, targets, coefficients, chunk=7, accumulate_in_forward=in_forward
            )
        expected = naive(hiddens, weight, targets, coefficients)[0]
        assert max_difference(loss, expected) < 1e-12, f"{loss.item()} != {expected.item()}"
        assert weight.grad is None, "an evaluation left a gradient"
        chunks = 2 * -(-POSITIONS // 7)
        assert seen.products == chunks, f"{seen.products} matrix products, {chunks} give all logits"


class WideTensors(TorchDispatchMode):
    """Counts matrix products, and follows the tensors of width V, logits, that are alive at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.peak = 0, 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func is torch.ops.aten.mm.default
        is_weight = func is torch.ops.aten.t.default
        if isinstance(result, Tensor) and result.dim() == 2 and result.shape[1] == VOCAB and not is_weight:
            self._alive[result.data_ptr()] = StorageWeakRef(result.untyped_storage()), result.numel()
            self.peak = max(self.peak, sum(size for storage, size in self._alive.values() if not storage.expired()))
        return result


class TestMemory:
    """Logits of one chunk of one head exist at a time, whatever the number of positions and heads.

    A breach: logits that grow with positions or with D, or the last chunk's surviving while the next is made.
    """

    @pytest.mark.parametrize("depth", [0, 3])
    @pytest.mark.parametrize("chunk", [1, 5, 23])
    def test_logits_alive(self, depth: int, chunk: int) -> None:
        hiddens, weight, targets, coefficients = case(depth)
        with WideTensors() as seen:
            loss, _, _ = linear_cross_entropy(hiddens, weight, targets, coefficients, chunk=chunk)
            loss.backward()
        assert seen.peak == chunk * VOCAB, f"{seen.peak / VOCAB} rows of logits were alive, chunk is {chunk}"

    def test_three_products_per_chunk(self) -> None:
        """Logits, hidden gradient and weight gradient: nothing is computed again in the backward."""
        hiddens, weight, targets, coefficients = case(1)
        with WideTensors() as seen:
            linear_cross_entropy(hiddens, weight, targets, coefficients, chunk=10)[0].backward()
        assert seen.products == 3 * 3 * 2, f"{seen.products} products != 3 per chunk x 3 chunks x 2 heads"


class TestHeadStats:
    """Sums, counts, and how often a depth's guess is the main head's own guess for the same token."""

    def test_hand_made(self) -> None:
        """One row of 4 positions, depth 1.

        Main head guesses 10 11 12 13 for tokens 1..4. Depth 1 guesses 11 12 99 . for tokens 2..5: against the main
        head one position later that is 11=11, 12=12, 99!=13; the target of position 2 is ignored, which leaves 2 of 2.
        """
        targets = torch.tensor([[[1, 2, 3, 4]], [[2, 3, IGNORE, 5]]])
        argmaxes = torch.tensor([[[10, 11, 12, 13]], [[11, 12, 99, 7]]])
        losses = torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[0.5, 0.25, 0.0, 1.0]]])
        stats = head_stats(losses, argmaxes, targets)
        assert stats.loss_sums.tolist() == [10.0, 1.75], f"{stats.loss_sums.tolist()} != [10, 1.75]"
        assert stats.counts.tolist() == [4, 3], f"{stats.counts.tolist()} != [4, 3]"
        assert stats.agreements.tolist() == [0, 2], f"{stats.agreements.tolist()} != [0, 2]"
        assert stats.comparable.tolist() == [0, 2], f"{stats.comparable.tolist()} != [0, 2]"

    def test_disagreement_counts_as_comparable(self) -> None:
        """Depth 2 looks two positions ahead; rows do not mix."""
        targets = torch.ones(3, 2, 3, dtype=torch.int64)
        argmaxes = torch.tensor([[[0, 1, 2], [3, 4, 5]], [[1, 9, 0], [4, 5, 0]], [[2, 0, 0], [2, 0, 0]]])
        stats = head_stats(torch.zeros(3, 2, 3), argmaxes, targets)
        assert stats.agreements.tolist() == [0, 3, 1], f"{stats.agreements.tolist()} != [0, 3, 1]"
        assert stats.comparable.tolist() == [0, 4, 2], f"{stats.comparable.tolist()} != [0, 4, 2]"

    def test_rows_shorter_than_the_depth(self) -> None:
        stats = head_stats(torch.zeros(4, 1, 2), torch.zeros(4, 1, 2).long(), torch.zeros(4, 1, 2).long())
        assert stats.comparable.tolist() == [0, 1, 0, 0], f"{stats.comparable.tolist()} != [0, 1, 0, 0]"


def test_torch_agrees_with_the_naive_formula() -> None:
    """The reference of this file is right."""
    hiddens, weight, targets, _ = case(0)
    expected = F.cross_entropy(hiddens[0] @ weight.t(), targets[0], ignore_index=IGNORE, reduction="sum")
    found = naive(hiddens, weight, targets, [1.0])[0]
    assert max_difference(found, expected) < 1e-12, f"{found} != {expected}"
