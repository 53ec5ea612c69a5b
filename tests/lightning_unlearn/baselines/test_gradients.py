"""Mean gradients of samples, their products, and the influence function, against one backward pass a view."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from baseline_toys import samples, subject, taken, toy_look, views_of
from reference import damped_matrix
from reference_baselines import cosine, feature, influence, residual
from torch import Tensor, nn
from toys import ToyDenoiser, ToyObjective, tiny_unet

from lightning_unlearn.baselines import TRAK, Baseline, GradientSimilarity, Influence, Subject
from lightning_unlearn.baselines.gradients import batch_gradients, query_gradients, training_gradients
from lightning_unlearn.baselines.per_sample import Output
from lightning_unlearn.baselines.sample_gradients import Gradients, join
from lightning_unlearn.data.batches import collate_samples
from lightning_unlearn.data.samples import Sample, SampleBatch
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.fisher import FISHERS

VIEWS = Views(timesteps=2, noises=2, seed=3)
TRAINING, QUERIES = samples(5, (1, 3, 2), flip=True), samples(3, (2, 1), flip=True, prefix="query")
VARIANTS = [
    VIEWS,
    Views(timesteps=2, noise="per_sample"),
    Views(timesteps=2, captions=2),
    Views(timesteps=2, flips=True),
    Views(timesteps=2, timestep_range=(0.5, 1.0)),
]


def flat(gradients: Gradients) -> Tensor:
    return torch.cat(list(gradients.parameters.values()), 1)


def slow(toy: Subject, group: list[Sample], output: str = "loss", *, normalised: bool = False) -> Tensor:
    parameters, look = toy_look(toy)
    return torch.stack(
        [feature(look, views_of(toy.views, sample), parameters, output, normalised=normalised) for sample in group]
    )


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("views", VARIANTS, ids=str)
@pytest.mark.parametrize("output", ["loss", "square", "mean"])
def test_gradients_are_means_over_the_views_that_a_sample_has(views: Views, output: Output) -> None:
    toy = subject(TRAINING, QUERIES, views)
    found = join(list(training_gradients(toy, output)))
    assert flat(found).dtype == torch.float64
    close(flat(found), slow(toy, TRAINING, output))
    close(flat(query_gradients(toy, output)), slow(toy, QUERIES, output))
    _, look = toy_look(toy)
    close(found.errors, torch.tensor([residual(look, views_of(views, z)) for z in TRAINING], dtype=torch.float64))


def test_captions_count_by_their_shares_in_training() -> None:
    whole = samples(1, (3,))[0]
    shares = [0.9, 0.0, 0.1]
    shared = replace(whole, metadata={**whole.metadata, "caption_weights": shares})
    toy = subject([samples(1, (2,))[0], shared], [shared], Views(timesteps=2), batch_size=2)
    parameters, look = toy_look(toy)
    of_each = [views_of(toy.views, whole)[2 * caption : 2 * caption + 2] for caption in range(3)]
    gradients = torch.stack([feature(look, views, parameters, "square") for views in of_each])
    weights = torch.tensor(shares, dtype=torch.float64)
    expected = (weights[:, None] * gradients).sum(0)
    found = join(list(training_gradients(toy, "square")))
    close(flat(found)[1], expected)
    close(flat(query_gradients(toy, "square"))[0], expected)
    residuals = torch.tensor([residual(look, views) for views in of_each], dtype=torch.float64)
    close(found.errors[1], (weights * residuals).sum())
    # Samples that say nothing are as they were.
    close(flat(found)[:1], slow(toy, [samples(1, (2,))[0]], "square"))


@pytest.mark.parametrize("output", ["square", "mean"])
def test_output_is_the_prediction_without_the_variance_beside_it(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UNet2DModel

    from lightning_unlearn.diffusion.families.class_unet import ClassUNetFamily
    from lightning_unlearn.diffusion.objective import DenoisingObjective

    # The smallest network that can have a variance; of its own family nobody says which half is which.
    monkeypatch.setattr(ClassUNetFamily, "variance", True)

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=6,
            block_out_channels=(4, 4),
            norm_num_groups=2,
            attention_head_dim=4,
            **blocks,
        )
    toy = subject(
        samples(2), samples(1, prefix="query"), network=network, objective=DenoisingObjective(), parameters=["conv_in"]
    )
    before = flat(join(list(training_gradients(toy, output))))
    with torch.no_grad():
        network.conv_out.weight[3:] *= 10  # the variance's half
    assert before.abs().max() > 0
    close(flat(join(list(training_gradients(toy, output)))), before)


def test_each_view_counts_alike_when_gradients_are_normalised() -> None:
    toy = subject(TRAINING, QUERIES, VIEWS)
    found = join(list(training_gradients(toy, "loss", per_timestep=True)))
    close(flat(found), slow(toy, TRAINING, normalised=True))
    close(flat(query_gradients(toy, "loss", per_timestep=True)), slow(toy, QUERIES, normalised=True))


def test_layers_with_and_without_bias_fed_by_text_alone() -> None:
    network = tiny_unet()
    from lightning_unlearn.diffusion.objective import DenoisingObjective

    toy = subject(
        samples(3), samples(1, prefix="query"), network=network, objective=DenoisingObjective(), parameters="text_kv"
    )
    gradients = join(list(training_gradients(toy, "loss")))
    assert {name.rpartition(".")[2] for name in gradients.parameters} == {"weight"}
    assert all((gradient != 0).any() for gradient in gradients.parameters.values())


def test_network_is_left_as_it_was() -> None:
    toy = subject(TRAINING, QUERIES)
    before = {name: weight.clone() for name, weight in toy.loss.network.state_dict().items()}
    list(training_gradients(toy, "square"))
    assert all(torch.equal(weight, before[name]) for name, weight in toy.loss.network.state_dict().items())
    assert not any(weight.requires_grad or weight.grad is not None for weight in toy.loss.network.parameters())
    assert not any(module._forward_hooks for module in toy.loss.network.modules())


def test_gradients_are_found_where_none_are_recorded() -> None:
    expected = flat(query_gradients(subject(TRAINING, QUERIES), "loss"))
    with torch.no_grad():
        close(flat(query_gradients(subject(TRAINING, QUERIES), "loss")), expected)


@pytest.mark.parametrize("per_timestep", [False, True])
def test_gradient_similarities_are_products_and_cosines(per_timestep: bool) -> None:
    toy = subject(TRAINING, QUERIES, VIEWS)
    training = slow(toy, TRAINING, normalised=per_timestep)
    queries = slow(toy, QUERIES, normalised=per_timestep)
    dots = torch.tensor([[float(z @ q) for q in queries] for z in training], dtype=torch.float64)
    cosines = torch.tensor([[cosine(z, q) for q in queries] for z in training], dtype=torch.float64)
    close(GradientSimilarity("dot", per_timestep).scores(toy), dots)
    close(GradientSimilarity("cosine", per_timestep).scores(toy), cosines)


def test_a_sample_without_gradient_scores_zero() -> None:
    toy = subject(TRAINING, QUERIES)
    for weight in toy.loss.network.parameters():
        weight.zero_()
    for method in (GradientSimilarity("cosine"), GradientSimilarity("dot", True)):
        # The last bias alone has a gradient where all weights are zero.
        small = Subject(toy.loss, {"text": toy.layers["text"]}, toy.views, toy.queries, toy.batches)
        assert torch.equal(method.scores(small), torch.zeros(5, 3, dtype=torch.float64))


# ---------------------------------------------------------------------- influence


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_influence_is_the_product_through_the_inverse_fisher(damping: float) -> None:
    bare = subject(TRAINING, QUERIES)
    fisher = taken(FISHERS["diagonal"], bare)
    toy = subject(TRAINING, QUERIES, fisher=fisher)
    means = {name: total.double() / fisher.count for name, total in fisher.tensors().items()}
    dense = damped_matrix(means, damping)
    close(Influence(damping).scores(toy), influence(slow(toy, TRAINING), slow(toy, QUERIES), dense))


@pytest.mark.parametrize("kind", FISHERS)
def test_influence_takes_every_kind_of_fisher(kind: str) -> None:
    bare = subject(TRAINING, QUERIES)
    fisher = taken(FISHERS[kind], bare)
    toy = subject(TRAINING, QUERIES, fisher=fisher)
    scores = Influence(0.5).scores(toy)
    fisher.finalize(0.5)
    shaped = {
        name: rows.unflatten(1, toy.loss.network.get_parameter(name).shape)
        for name, rows in query_gradients(toy, "loss").parameters.items()
    }
    raised = torch.cat([rows.flatten(1) for rows in fisher.precondition(shaped).values()], 1)
    close(scores, slow(toy, TRAINING) @ raised.mT)


def test_influence_needs_a_fisher_of_these_layers() -> None:
    with pytest.raises(InputError, match="needs a Fisher; make one with `lightning-unlearn fisher`"):
        Influence().scores(subject(TRAINING, QUERIES))
    other = taken(FISHERS["diagonal"], subject(TRAINING, QUERIES, parameters=["text"]))
    with pytest.raises(InputError, match=r"no layer conv_in of shape \(5, 3, 3, 3\)"):
        Influence().scores(subject(TRAINING, QUERIES, fisher=other))
    with pytest.raises(InputError, match="Damping must be finite and not negative, but is -1"):
        Influence(-1)


# ---------------------------------------------------------------------- order, memory, bad input


@pytest.mark.parametrize("noise", ["shared", "per_sample"])
def test_order_and_size_of_batches_change_nothing(noise: Any) -> None:
    views = Views(timesteps=2, noise=noise)
    expected = GradientSimilarity().scores(subject(TRAINING, QUERIES, views))
    order, columns = [3, 1, 4, 0, 2], [1, 2, 0]
    toy = subject([TRAINING[row] for row in order], [QUERIES[c] for c in columns], views, batch_size=2)
    close(GradientSimilarity().scores(toy), expected[order][:, columns])


def counted(toy: Subject) -> list[int]:
    """Grows with every forward pass of the network."""
    calls: list[int] = []
    toy.loss.network.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_gradients_are_computed_once_where_they_are_kept() -> None:
    fisher = taken(FISHERS["diagonal"], subject(TRAINING, QUERIES))
    toy = subject(TRAINING, QUERIES, fisher=fisher, keep=True)
    calls = counted(toy)
    first = GradientSimilarity().scores(toy)
    passes = len(calls)
    close(GradientSimilarity().scores(toy), first)
    GradientSimilarity("cosine").scores(toy)
    for damping in (0.1, 1.0):
        Influence(damping).scores(toy)
    assert len(calls) == passes
    GradientSimilarity("dot", True).scores(toy)
    assert len(calls) == 2 * passes


def test_samples_gradients_are_not_kept_unasked() -> None:
    toy = subject(TRAINING, QUERIES)
    calls = counted(toy)
    GradientSimilarity().scores(toy)
    assert set(toy.cache) == {("queries", "loss", False)}
    passes = len(calls)
    GradientSimilarity().scores(toy)
    assert len(calls) > passes


def test_a_pass_that_stops_early_leaves_nothing_behind() -> None:
    toy = subject(TRAINING, QUERIES, keep=True)
    next(training_gradients(toy, "loss"))
    assert not toy.cache


def test_a_gradient_that_is_not_finite_is_named() -> None:
    bad = samples(4)
    bad[2].latent[0, 0, 0] = float("inf")
    with pytest.raises(InputError, match="The gradient of 'sample-00002' is not finite"):
        list(training_gradients(subject(bad, QUERIES), "loss"))


@pytest.mark.parametrize("method", [GradientSimilarity(), Influence(), TRAK()], ids=lambda method: method.name)
def test_query_without_the_flip_that_is_scored_is_named_before_any_sample_is_looked_at(method: Baseline) -> None:
    def batches() -> list[SampleBatch]:
        raise AssertionError

    toy = subject(TRAINING, [*QUERIES, *samples(4, prefix="query")[3:]], Views(timesteps=2, flips=True))
    toy = replace(toy, batches=batches, fisher=taken(FISHERS["diagonal"], toy))
    assert method.needs_query_views
    with pytest.raises(InputError, match=r"the query 'query-01003' has no latent_flip\.npy; prepare the queries"):
        method.scores(toy)


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(InputError, match="no training samples"):
        list(training_gradients(subject([], QUERIES), "loss"))


class Doubling(ToyDenoiser):
    """Runs its text layer on twice the rows, as guidance does."""

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        hidden = self.text(torch.cat([text, torch.zeros_like(text)]))[: len(text)]
        out: Tensor = self.conv_out(torch.tanh(hidden.mean(1)[:, :, None, None] + self.conv_in(noisy)))
        return out


def test_rows_that_are_not_samples_are_refused() -> None:
    toy = subject(TRAINING, QUERIES, network=Doubling(), parameters=["text"])
    with pytest.raises(InputError, match="Layer text sees 6 rows for 3 samples"):
        list(training_gradients(toy, "loss"))


def test_a_batch_is_as_its_samples_alone() -> None:
    toy = subject(TRAINING, QUERIES)
    together = batch_gradients(toy, collate_samples("shard", TRAINING), "square")
    for row, sample in enumerate(TRAINING):
        alone = batch_gradients(toy, collate_samples("shard", [sample]), "square")
        close(flat(together)[row], flat(alone)[0])


class Wrapped(ToyDenoiser):
    """Answers in a tuple, as diffusers' networks do."""

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Any:
        return (super().forward(noisy, timesteps, text),)


class Unwrapping(ToyObjective):
    def __call__(self, network: nn.Module, batch: Any, timesteps: Tensor, noise: Tensor) -> Tensor:
        return super().__call__(lambda *arguments: network(*arguments)[0], batch, timesteps, noise)  # type: ignore[arg-type]


def test_prediction_is_found_in_what_the_network_returns() -> None:
    expected = flat(query_gradients(subject(TRAINING, QUERIES), "square"))
    toy = subject(TRAINING, QUERIES, network=Wrapped(), objective=Unwrapping())
    close(flat(query_gradients(toy, "square")), expected)


def test_a_layer_that_is_not_what_it_seems_has_no_gradients_here() -> None:
    """Its weight is used by a function besides, which no hook on the layer sees."""
    toy = subject(TRAINING, QUERIES)
    network = toy.loss.network
    plain = network.forward

    def forward(*arguments: Any, **named: Any) -> Tensor:
        found: Tensor = plain(*arguments, **named)
        return found + network.text.weight.mean()  # type: ignore[union-attr]

    network.forward = forward  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"captured of layer text is not the gradient of its weight"):
        GradientSimilarity("dot").scores(toy)
