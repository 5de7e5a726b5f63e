"""AdamW with bf16 moments against torch's own and against formulas in fp64, without a process group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dist_mtp.parallel import adamw
from dist_mtp.parallel.adamw import AdamW

LR, BETA1, BETA2, EPS = 1e-2, 0.9, 0.95, 1e-8
DECAYS = (0.1, 0.0)
NUMEL = 1000
CHUNK = 256
"""Elements of a chunk in these tests; no divisor of ``NUMEL``."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "_CHUNK", CHUNK)


def make(optimizer: type[torch.optim.Optimizer], **options: object) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    """An optimizer of two groups of one parameter, with and without weight decay."""
    generator = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.randn(NUMEL, generator=generator)) for _ in DECAYS]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(parameters, DECAYS, strict=True)]
    return optimizer(groups, lr=LR, betas=(BETA1, BETA2), eps=EPS, **options), parameters  # type: ignore[call-arg]


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    """Gradients whose sizes span six decades."""
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        sizes = torch.logspace(-6, 0, NUMEL)[torch.randperm(NUMEL, generator=generator)]
        parameter.grad = sizes * torch.randn(NUMEL, generator=generator)


def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    state = optimizer.state[parameter]
    return state["exp_avg"], state["exp_avg_sq"]


def assert_rounded_once(found: Tensor, terms: tuple[Tensor, Tensor], what: str) -> None:
    """``found`` [n] in bf16 is the sum of two ``terms`` [n] in fp64, but for fp32 arithmetic and one rounding.

    bf16 numbers from 2^e to 2^(e+1) are 2^(e-7) apart, so one rounding is off by at most 2^(e-8). The few fp32 operations
    before it round by 2^-24 of the terms each.
    """
    exact, size = terms[0] + terms[1], terms[0].abs() + terms[1].abs()
    mantissa, exponent = torch.frexp(exact)  # mantissa from 1/2 to 1
    rounding = torch.ldexp(torch.ones_like(mantissa), exponent - 9)
    worst = ((found.double() - exact).abs() / (rounding + 2**-22 * size)).max().item()
    assert worst <= 1, f"{what}: off by {worst} times a single rounding"


class TestFp32Moments:
    """The arithmetic is that of ``torch.optim.AdamW`` to the bit: in fp32 nothing else could differ but the walk over chunks
    and groups."""

    def test_equals_torch(self) -> None:
        theirs, their_parameters = make(torch.optim.AdamW)
        ours, our_parameters = make(AdamW, moment_dtype=torch.float32)
        for step in range(1, 6):
            for optimizer, parameters in ((theirs, their_parameters), (ours, our_parameters)):
                give_gradients(parameters, step)
                optimizer.step()
            for group, (our, their) in enumerate(zip(our_parameters, their_parameters, strict=True)):
                pairs = [(our, their), *zip(moments(ours, our), moments(theirs, their), strict=True)]
                for what, (found, expected) in zip(("parameter", "exp_avg", "exp_avg_sq"), pairs, strict=True):
                    different = (found != expected).nonzero().flatten().tolist()
                    assert not different, f"step {step}, group {group}: {what} differs at elements {different[:9]}"


class TestBf16Moments:
    """A step starts from the bf16 moments of the one before, computes in fp32, and rounds each moment once. Arithmetic in
    bf16 would be off by several roundings, and by all of a parameter's 16 lower bits."""

    def test_each_step(self) -> None:
        optimizer, parameters = make(AdamW)
        for step in range(1, 21):
            give_gradients(parameters, step)
            before = [
                [t.double() for t in (p.detach().clone(), *(moments(optimizer, p) if step > 1 else (0 * p, 0 * p)))]
                for p in parameters
            ]
            optimizer.step()
            for (old, m, v), decay, parameter in zip(before, DECAYS, parameters, strict=True):
                assert parameter.grad is not None
                gradient, case = parameter.grad.double(), f"step {step}, weight decay {decay}"
                terms = (BETA1 * m, (1 - BETA1) * gradient), (BETA2 * v, (1 - BETA2) * gradient**2)
                for kind, found, two in zip(
                    ("exp_avg", "exp_avg_sq"), moments(optimizer, parameter), terms, strict=True
                ):
                    assert found.dtype == torch.bfloat16, f"{case}: {kind} is {found.dtype}"
                    assert_rounded_once(found, two, f"{case}: {kind}")
                m, v = (sum(two) for two in terms)
                update = (m / (1 - BETA1**step)) / ((v / (1 - BETA2**step)).sqrt() + EPS)
                expected = old - LR * (decay * old + update)
                # Decay and sum round the parameter, each by 2^-24 of it; the update takes about eight operations.
                bound = 2**-24 * (2 * old.abs() + 8 * LR * update.abs())
                worst = ((parameter.double() - expected).abs() / bound).max().item()
                assert worst <= 1, f"{case}: parameter off by {worst} times what fp32 can round"

    @pytest.mark.parametrize(("beta", "stuck"), [(1 - 2**-8, 0), (0.997, 38), (1 - 2**-9, 128)])
    def test_limit_of_beta(self, beta: float, stuck: int) -> None:
        """Why ``config_checks`` refuses 1 - beta below 2^-8: there every bf16 number (128 between 1 and 2) decays without
        gradients, at 0.003 those do not whose decay is less than 2^-8 (from 1 + 1/128 to 1 + 38/128), at 2^-9 none does."""
        parameter = nn.Parameter(torch.zeros(128))
        optimizer = AdamW([parameter], lr=0.0, betas=(beta, beta), eps=EPS)
        optimizer.state[parameter] = adamw.zero_state(parameter, torch.bfloat16)
        for moment in moments(optimizer, parameter):
            moment.copy_(1 + torch.arange(128) / 128)
        before = [moment.clone() for moment in moments(optimizer, parameter)]
        parameter.grad = torch.zeros(128)
        optimizer.step()
        for kind, old, new in zip(("exp_avg", "exp_avg_sq"), before, moments(optimizer, parameter), strict=True):
            count = int((old == new).sum())
            assert count == stuck, f"beta {beta}: {count} of 128 numbers keep {kind}, expected {stuck}"
