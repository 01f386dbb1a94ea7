"""Products that sum over tokens: moments are exact, estimates are close on processors that multiply bfloat16."""

import pytest
import torch

from entrollm.calibrate import products


def test_moments_are_exact() -> None:
    x = torch.randn(50, 34, generator=torch.Generator().manual_seed(1))
    for part in (x, x[:, :1], x[:, ::2], x[:1]):
        torch.testing.assert_close(products.moments(part).tril(), (part.T @ part).tril())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_rounds_factors_of_estimates_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(4096, 256, generator=generator).cuda() for _ in range(2))
    exact = first.double().T @ second.double(), second.double().T @ second.double()

    def errors() -> list[float]:
        found = products.estimate(first, second), products.moments(second).tril()
        pairs = zip(found, (exact[0], exact[1].tril()), strict=True)
        return [float((ours.double() - theirs).norm() / theirs.norm()) for ours, theirs in pairs]

    with products.rounded(first.device):
        estimated, moments = errors()
    assert 1e-5 < estimated < 1e-3 and moments < 1e-6
    assert max(errors()) < 1e-6  # as it was before


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_estimates_are_close(has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_HAS_BFLOAT16", has_bfloat16)
    generator = torch.Generator().manual_seed(1)
    first, second = 1e-12 * torch.randn(200, 20, generator=generator), torch.randn(200, 33, generator=generator)
    found, exact = products.estimate(first, second), first.T @ second
    assert found.dtype == torch.float32 and found.shape == (20, 33)
    assert (found - exact).norm() < (5e-3 if has_bfloat16 else 1e-6) * exact.norm()
    assert torch.equal(found, exact) != has_bfloat16
