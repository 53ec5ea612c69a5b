"""What a fine-tuning learned from each image, against the loss of each view by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import adapter_forms as forms
import pytest
import torch
from baseline_toys import samples, subject, toy_look, views_of
from torch import Tensor, nn
from toys import ToyDenoiser

from lightning_unlearn.baselines import Subject, Undone
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.diffusion.adapters import has_adapter, load_adapter, merge_adapter
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError

TRAINING = samples(7, (1, 3, 2), flip=True)
VIEWS = Views(timesteps=3, flips=True)


def base() -> nn.Module:
    return ToyDenoiser(seed=4).double()


ADAPTER = forms.random_adapter(base(), ["text", "conv_in"])


def adapted(tmp_path: Path) -> nn.Module:
    network = base()
    load_adapter(network, forms.save(tmp_path / "a.safetensors", forms.kohya_state(ADAPTER)))
    return network


def toy(network: nn.Module, **settings: Any) -> Subject:
    return subject(
        TRAINING, [], VIEWS, network=network, parameters="adapter" if has_adapter(network) else "all", **settings
    )


def slow(network: nn.Module) -> list[list[float]]:
    """The loss of every view of every sample."""
    _, look = toy_look(toy(network))
    with torch.no_grad():
        return [[float(look(view)[0]) for view in views_of(VIEWS, sample)] for sample in TRAINING]


def mean(values: list[float], sample: Sample) -> float:
    # Flips hold the same captions and draws, so that the mean over all views is the mean of the means.
    assert len(values) == 2 * len(sample.text) * VIEWS.draws
    return sum(values) / len(values)


def expected(rule: str = "difference") -> Tensor:
    """The weights that the papers' formula gives, and those before, each by a network of its own."""
    before, after = slow(base()), slow(forms.applied(base(), ADAPTER))
    found = []
    for sample, were, are in zip(TRAINING, before, after, strict=True):
        pairs = zip(were, are, strict=True)
        values = [b - a if rule == "difference" else (b - a) / (b + a) for b, a in pairs]
        found.append(mean(values, sample))
    return torch.tensor(found, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("rule", ["difference", "ratio"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_adapter_off_minus_adapter_on(tmp_path: Path, rule: Any, batch_size: int) -> None:
    network = adapted(tmp_path)
    found = Undone(rule=rule).scores(toy(network, batch_size=batch_size))
    # Adapters are stored and added in float32; scores in float64 have each its rounding, amplified at most by the
    # network's slopes.
    torch.testing.assert_close(found, expected(rule), rtol=1e-5, atol=1e-6)
    assert found.abs().min() > 1e-4
    # The adapter is on again.
    torch.testing.assert_close(Undone(rule=rule).scores(toy(network)), found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["difference", "ratio"])
def test_weights_before_are_those_without_an_adapter(tmp_path: Path, rule: Any) -> None:
    network = adapted(tmp_path)
    merge_adapter(network)
    torch.save({"state_dict": {f"net.{name}": value for name, value in base().state_dict().items()}}, tmp_path / "b.pt")
    now = {name: value.clone() for name, value in network.state_dict().items()}
    found = Undone(str(tmp_path / "b.pt"), rule=rule).scores(toy(network))
    torch.testing.assert_close(found, expected(rule), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, now[name]) for name, value in network.state_dict().items())


def test_captions_count_by_their_shares_in_training(tmp_path: Path) -> None:
    sample = samples(2, (3,))[1]
    shared = replace(sample, metadata={**sample.metadata, "caption_weights": [0.9, 0.0, 0.1]})
    views = Views(timesteps=2)

    def losses(network: nn.Module) -> Tensor:
        _, look = toy_look(subject([sample], [], views, network=network))
        with torch.no_grad():
            return torch.tensor([float(look(view)[0]) for view in views_of(views, sample)]).reshape(3, 2).mean(1)

    rises = losses(base()) - losses(forms.applied(base(), ADAPTER))
    found = Undone().scores(subject([shared], [], views, network=adapted(tmp_path), parameters="adapter"))
    assert float(found) == pytest.approx(float(rises @ torch.tensor([0.9, 0.0, 0.1])), rel=1e-4)


def test_what_can_not_be_undone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapter to switch off"):
        Undone().scores(toy(base()))
    torch.save(base().state_dict(), tmp_path / "b.pt")
    with pytest.raises(InputError, match="leave `before` out"):
        Undone(str(tmp_path / "b.pt")).scores(toy(adapted(tmp_path)))
    with pytest.raises(InputError, match="these are the same weights"):
        Undone(str(tmp_path / "b.pt")).scores(toy(base()))
    with pytest.raises(InputError, match="no score rule 'sum'"):
        Undone(rule="sum")  # type: ignore[arg-type]


def test_the_weights_come_back_after_an_error(tmp_path: Path) -> None:
    network = base()
    torch.save({name: value + 1 for name, value in network.state_dict().items()}, tmp_path / "b.pt")
    passes = 0
    whole = toy(network)

    def broken() -> Any:
        nonlocal passes
        passes += 1
        if passes == 2:
            raise InputError("The shard is gone.")
        return whole.batches()

    with pytest.raises(InputError, match="gone"):
        Undone(str(tmp_path / "b.pt")).scores(replace(whole, batches=broken))
    assert all(torch.equal(value, base().state_dict()[name]) for name, value in network.state_dict().items())
