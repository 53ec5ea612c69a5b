"""Slow, obvious float64 versions of unlearning and scoring, by plain loops over draws, weights and views."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from reference import denoising_loss
from torch import Tensor, nn

from lightning_unlearn.diffusion.objective import DenoisingObjective

# A view's loss of one sample: latent (C, H, W), text (tokens, dim), timestep, noise (C, H, W).
Loss = Callable[[nn.Module, Tensor, Tensor, int, Tensor], Tensor]
Weights = Mapping[str, Tensor]


def toy_loss(network: nn.Module, latent: Tensor, text: Tensor, timestep: int, noise: Tensor) -> Tensor:
    """The loss of ``toys.ToyObjective`` for one view."""
    s = float(torch.tensor((timestep + 1) / 11, dtype=torch.float32))  # as the objective rounds it
    prediction = network(((1 - s) * latent + s * noise)[None], torch.tensor([timestep]), text[None])[0]
    return ((prediction - noise) ** 2).mean()


def unet_loss(prediction_type: str) -> Loss:
    """A UNet's loss for one view, with the default schedule."""
    alphas = DenoisingObjective({}, prediction_type).scheduler.alphas_cumprod  # type: ignore[arg-type]

    def loss(network: nn.Module, latent: Tensor, text: Tensor, timestep: int, noise: Tensor) -> Tensor:
        def predict(noisy: Tensor) -> Tensor:
            found: Tensor = network(noisy[None], timestep, encoder_hidden_states=text[None]).sample[0]
            return found

        return denoising_loss(predict, latent, noise, float(alphas[timestep]), prediction_type)

    return loss


class Naive:
    """A copy of a network whose weights are overwritten for every evaluation."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self.network = copy.deepcopy(network).double().requires_grad_(False)
        everything = dict(self.network.named_parameters())
        self.chosen = {name: everything[name].requires_grad_(True) for name in names}
        self.base = {name: parameter.detach().clone() for name, parameter in self.chosen.items()}

    def put(self, delta: Weights | None) -> nn.Module:
        """The network under ``θ₀ + δ``."""
        with torch.no_grad():
            for name, parameter in self.chosen.items():
                parameter.copy_(self.base[name] if delta is None else self.base[name] + delta[name])
        return self.network

    def gradient(self, delta: Weights, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
        """The gradient of a loss at ``θ₀ + δ``."""
        found = torch.autograd.grad(loss(self.put(delta)), list(self.chosen.values()), allow_unused=True)
        return {
            name: torch.zeros_like(self.base[name]) if gradient is None else gradient
            for name, gradient in zip(self.chosen, found, strict=True)
        }

    @torch.no_grad()
    def value(self, delta: Weights | None, loss: Callable[[nn.Module], Tensor]) -> float:
        """A loss at ``θ₀ + δ``."""
        return float(loss(self.put(delta)))


def layer_means(fisher: Weights) -> dict[str, float]:
    """The mean Fisher of each layer, over all entries of its weight and bias."""
    entries: dict[str, list[float]] = {}
    for name, diagonal in fisher.items():
        entries.setdefault(name.rpartition(".")[0], []).extend(diagonal.flatten().tolist())
    return {layer: math.fsum(values) / len(values) for layer, values in entries.items()}


def natural_step(gradient: Weights, fisher: Weights, damping: float, step_size: float) -> dict[str, Tensor]:
    """``step_size · g_j / (F_jj + damping · mean F of the layer)``, entry by entry."""
    means = layer_means(fisher)
    step = {}
    for name, values in gradient.items():
        mean = means[name.rpartition(".")[0]]
        pairs = zip(values.flatten().tolist(), fisher[name].flatten().tolist(), strict=True)
        moved = [step_size * g / (f + damping * mean) for g, f in pairs]
        step[name] = torch.tensor(moved, dtype=torch.float64).reshape(values.shape)
    return step


def mean_gradient(naive: Naive, delta: Weights, losses: Sequence[Callable[[nn.Module], Tensor]]) -> dict[str, Tensor]:
    """The gradient of the mean of several losses, one after the other."""
    total = {name: torch.zeros_like(value) for name, value in naive.base.items()}
    for loss in losses:
        for name, gradient in naive.gradient(delta, loss).items():
            total[name] += gradient
    return {name: value / len(losses) for name, value in total.items()}


def newton_delta(
    naive: Naive,
    fisher: Weights,
    damping: float,
    step_size: float,
    draws: Sequence[Sequence[Callable[[nn.Module], Tensor]]],
) -> dict[str, Tensor]:
    """Steps of ``δ ← δ + (α/N) F⁻¹ ∇L(θ₀ + δ)``, with the losses of each step's draws."""
    delta = {name: torch.zeros_like(value) for name, value in naive.base.items()}
    for losses in draws:
        step = natural_step(mean_gradient(naive, delta, losses), fisher, damping, step_size)
        delta = {name: delta[name] + step[name] for name in delta}
    return delta


def scale_by_bisection(rise: Callable[[float], float], wanted: float) -> float:
    """Where a rising function reaches ``wanted``."""
    low, high = 0.0, 1.0
    while rise(high) < wanted:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if rise(middle) < wanted else (low, middle)
    return (low + high) / 2


def values_by_draw(base: Tensor, unlearned: Tensor, captions: int, rule: str) -> list[list[float]]:
    """A rule's value of each flip and draw, mean over captions, from a sample's losses ``(flips, captions, draws)``."""
    sides = []
    for flip in range(base.shape[0]):
        draws = []
        for draw in range(base.shape[2]):
            terms = []
            for caption in range(captions):
                before, after = float(base[flip, caption, draw]), float(unlearned[flip, caption, draw])
                terms.append(after - before if rule == "difference" else (after - before) / (after + before))
            draws.append(math.fsum(terms) / len(terms))
        sides.append(draws)
    return sides


def score(base: Tensor, unlearned: Tensor, captions: int, rule: str, flips: str = "max") -> float:
    """One sample's score for one target, from its losses ``(flips, captions, draws)``."""
    sides = [math.fsum(draws) / len(draws) for draws in values_by_draw(base, unlearned, captions, rule)]
    return max(sides) if flips == "max" else math.fsum(sides) / len(sides)


def half_width(base: Tensor, unlearned: Tensor, captions: int, rule: str, flips: str, noises: int) -> float | None:
    """Half of the 95 % interval of one sample's score, from its losses ``(flips, captions, draws)``."""
    sides = values_by_draw(base, unlearned, captions, rule)
    if flips == "max":
        values = max(sides, key=math.fsum)
    else:
        values = [math.fsum(pair) / len(pair) for pair in zip(*sides, strict=True)]
    groups: list[list[float]] = []
    for draw, value in enumerate(values):
        # With one noise a stratum, two neighbours are a group.
        if draw % (noises if noises > 1 else 2) == 0:
            groups.append([])
        groups[-1].append(value)
    if len(groups[-1]) == 1:  # the last of an odd number of strata goes to the pair before it
        alone = groups.pop()
        if not groups:
            return None
        groups[-1] += alone
    variances, freedoms = [], []
    for group in groups:
        mean = math.fsum(group) / len(group)
        scatter = math.fsum((value - mean) ** 2 for value in group) / (len(group) - 1)
        weight = len(group) / len(values)
        variances.append(weight**2 * scatter / len(group))
        freedoms.append(len(group) - 1)
    total = math.fsum(variances)
    if total == 0:
        return 0.0
    degrees = total**2 / math.fsum(v**2 / (f + 2) for v, f in zip(variances, freedoms, strict=True)) - 2
    return student_quantile(min(max(degrees, min(freedoms)), sum(freedoms))) * math.sqrt(total)


def student_quantile(degrees: float) -> float:
    """Where Student's distribution has 95 % of its mass to both sides of zero: its density summed up, and bisection."""
    factor = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)

    def inside(reach: float) -> float:
        places = torch.linspace(0, reach, 4001, dtype=torch.float64)
        density = factor * (1 + places**2 / degrees) ** (-(degrees + 1) / 2)
        return 2 * float(torch.trapezoid(density, places))

    low, high = 0.0, 20.0
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return (low + high) / 2


def mirrored_gradient(
    naive: Naive,
    delta: Weights,
    real: Sequence[Callable[[nn.Module], Tensor]],
    own: Sequence[Callable[[nn.Module], Tensor]],
    strength: float,
    null_loss: float,
) -> dict[str, Tensor]:
    """The gradient of ``mean L(real) - strength · mean min(L(query), null_loss)``, one draw after the other."""
    total = {name: torch.zeros_like(value) for name, value in naive.base.items()}
    for loss in real:
        for name, gradient in naive.gradient(delta, loss).items():
            total[name] += gradient / len(real)
    for loss in own:
        if naive.value(delta, loss) < null_loss:
            for name, gradient in naive.gradient(delta, loss).items():
                total[name] -= strength * gradient / len(own)
    return total
