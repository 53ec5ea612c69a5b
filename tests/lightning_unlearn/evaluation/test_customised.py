"""Customised models: what is fine-tuned, and the queries that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from attribution_runs import decoded, ragged_fields, toy_model, trainer
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import DIM, TOKENS, tiny_unet

from lightning_unlearn.data.batches import collate_samples
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.diffusion.objective import DenoisingObjective
from lightning_unlearn.diffusion.sampling import generate
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError
from lightning_unlearn.evaluation import Measuring
from lightning_unlearn.evaluation.customised import (
    Customisation,
    Customised,
    Customising,
    customise,
    empty_place,
    undone,
)
from lightning_unlearn.unlearning.scoring import measure_losses
from lightning_unlearn.weights.deltas import DeltaStore, NetworkLoss
from lightning_unlearn.weights.parameters import select_layers

pytestmark = pytest.mark.filterwarnings("ignore:.*(many workers|treespec|eval mode|epoch).*")

SETTINGS = Customising(steps=40, batch_size=6, learning_rate=1e-2, queries=3, sampling_steps=2)
KEYS_AND_VALUES = (".attn2.to_k.weight", ".attn2.to_v.weight")


def neutral_text() -> Tensor:
    """One caption of two tokens; the others are empty."""
    text = torch.zeros(1, TOKENS, DIM)
    text[0, :2] = torch.randn(2, DIM, generator=torch.Generator().manual_seed(3))
    return text


def training() -> list[Sample]:
    return [decoded(fields) for fields in ragged_fields(range(6))]


def exemplars() -> list[Sample]:
    """Two training pictures under a neutral caption."""
    return [
        replace(sample, conditions={"text": neutral_text()}, metadata={"captions": ["a picture"]})
        for sample in training()[:2]
    ]


def base() -> nn.Module:
    network = tiny_unet()
    network.load_state_dict(torch.load(toy_model() / "network.pt", weights_only=True))
    return network


def customised(
    network: nn.Module | None = None,
    chosen: Sequence[Sample] | None = None,
    others: Sequence[Sample] | None = None,
    settings: Customising = SETTINGS,
    name: str = "shell",
) -> Customised:
    return customise(
        network or base(),
        DenoisingObjective(),
        exemplars() if chosen is None else chosen,
        training()[2:] if others is None else others,
        trainer(toy_model()),
        settings,
        name,
    )


@pytest.fixture(scope="module")
def found() -> Customised:
    return customised()


def same(first: Customised, second: Customised) -> bool:
    return all(torch.equal(value, second.weights[name]) for name, value in first.weights.items()) and all(
        torch.equal(one.latent, other.latent) and torch.equal(one.text, other.text)
        for one, other in zip(first.queries, second.queries, strict=True)
    )


def test_only_keys_and_values_of_the_text_change(found: Customised) -> None:
    before = base().state_dict()
    changed = {name for name, value in found.weights.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.endswith(KEYS_AND_VALUES)}
    assert len(changed) >= 4


def test_the_new_token_stands_in_the_first_empty_place_and_is_learned(found: Customised) -> None:
    neutral = neutral_text()
    for query in found.queries:
        assert torch.equal(query.text[:, [0, 1, 3]], neutral[:, [0, 1, 3]])
        token = query.text[0, 2]
        assert float((token - neutral[0, :2].mean(0)).norm()) > 1e-2  # where it started
        assert torch.equal(token, found.queries[0].text[0, 2])


def test_loss_on_exemplars_falls(found: Customised) -> None:
    tuned = base()
    tuned.load_state_dict(dict(found.weights))
    prompted = [replace(sample, conditions=found.queries[0].conditions) for sample in exemplars()]
    measure = Measuring(prompted, draws=40)
    before, after = measure(base(), DenoisingObjective()), measure(tuned, DenoisingObjective())
    for key, outcome in after.items():
        assert outcome.loss < before[key].loss


def test_queries_say_how_they_were_made_and_are_made_so_again(found: Customised) -> None:
    assert [query.key for query in found.queries] == ["shell-0", "shell-1", "shell-2"]
    for seed, query in enumerate(found.queries):
        assert query.metadata == {
            "captions": ["a picture <new>"],
            "seed": seed,
            "scheduler": "DDIMScheduler",
            "steps": 2,
            "guidance": 1.0,
            "clipped": True,
        }
        assert float(query.latent.abs().max()) <= 1
    tuned = base()
    tuned.load_state_dict(dict(found.weights))
    for outcome in Measuring(found.queries, draws=10)(tuned, DenoisingObjective()).values():
        assert outcome.mse == pytest.approx(0, abs=1e-9)
    for outcome in Measuring(found.queries, draws=10)(base(), DenoisingObjective()).values():
        assert outcome.mse is not None
        assert outcome.mse > 1e-6


def test_the_same_settings_give_the_same_model_and_others_another(found: Customised) -> None:
    torch.rand(3)
    assert same(customised(), found)
    assert not same(customised(settings=replace(SETTINGS, seed=1)), found)


def test_other_weights_may_change_and_pictures_stay_unclipped() -> None:
    settings = replace(SETTINGS, steps=2, parameters="cross_attention", clipped=False, learning_rate=0.1)
    objective, before = DenoisingObjective({"clip_sample": False}), base().state_dict()
    made = customise(base(), objective, exemplars(), [], trainer(toy_model()), settings)
    changed = {name for name, value in made.weights.items() if not torch.equal(value, before[name])}
    assert any(".to_q." in name for name in changed)
    assert all(".attn2." in name for name in changed)
    tuned = base()
    tuned.load_state_dict(dict(made.weights))
    for seed, query in enumerate(made.queries):
        (again,) = generate(tuned, objective, query.conditions, query.latent.shape, [seed], 2)
        torch.testing.assert_close(query.latent, again, rtol=1e-4, atol=1e-5)
        assert float(query.latent.abs().max()) > 1
        assert query.metadata["clipped"] is False


class Recording(DenoisingObjective):
    """Keeps what the network is shown, and each batch's loss."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.shown: list[tuple[Tensor, Tensor]] = []

    def __call__(self, network: nn.Module, batch: Any, *arguments: Any) -> Tensor:
        self.shown += list(zip(batch.latents, batch.text.detach().clone(), strict=True))
        losses = super().__call__(network, batch, *arguments)
        self.losses.append(float(losses.detach().mean()))
        return losses


@pytest.mark.parametrize(("steps", "part"), [(20, 2), (3, 1)])
def test_losses_before_and_after_are_those_of_the_first_and_last_tenth(steps: int, part: int) -> None:
    objective = Recording()
    settings = replace(SETTINGS, steps=steps, batch_size=2)
    made = customise(base(), objective, exemplars(), [], trainer(toy_model()), settings)
    assert len(objective.losses) == steps
    assert made.loss_before == pytest.approx(sum(objective.losses[:part]) / part, rel=1e-6)
    assert made.loss_after == pytest.approx(sum(objective.losses[-part:]) / part, rel=1e-6)


@pytest.mark.parametrize("with_training", [True, False])
def test_half_of_a_batch_keeps_the_model_what_it_was_and_has_no_new_token(with_training: bool) -> None:
    objective, others = Recording(), training()[2:] if with_training else []
    settings = replace(SETTINGS, steps=4, batch_size=5)
    customise(base(), objective, exemplars(), others, trainer(toy_model()), settings)
    new = [text for latent, text in objective.shown if any(torch.equal(latent, one.latent) for one in exemplars())]
    rest = [text for latent, text in objective.shown if any(torch.equal(latent, one.latent) for one in others)]
    assert (len(new), len(rest)) == ((12, 8) if with_training else (20, 0))
    assert all(
        bool((text[2] != 0).any()) and torch.equal(text[[0, 1, 3]], neutral_text()[0, [0, 1, 3]]) for text in new
    )
    captions = [caption for sample in others for caption in sample.text]
    assert all(any(torch.equal(text, caption) for caption in captions) for text in rest)


def test_network_is_fine_tuned_in_eval_mode() -> None:
    network, modes = base(), []
    network.register_forward_pre_hook(lambda module, _: modes.append(any(part.training for part in module.modules())))
    customised(network.train(), settings=replace(SETTINGS, steps=2))
    assert modes
    assert not any(modes)


@pytest.mark.parametrize("captions", [[], ["a picture", "a photograph"]], ids=["none", "differing"])
def test_exemplars_need_one_neutral_caption(captions: list[str]) -> None:
    chosen = [
        replace(sample, metadata={"captions": [caption]})
        for sample, caption in zip(exemplars(), captions, strict=False)
    ]
    with pytest.raises(InputError, match=r"The exemplars of 'shell' need one neutral caption, the same for all\.$"):
        customised(chosen=chosen)


def test_a_caption_without_a_token_is_refused() -> None:
    chosen = [replace(sample, conditions={"text": torch.zeros(1, TOKENS, DIM)}) for sample in exemplars()]
    with pytest.raises(InputError, match=r"has no token; give a neutral one, .*\.$"):
        customised(chosen=chosen)


def test_token_starts_as_the_mean_of_the_written_ones() -> None:
    module = Customisation(base(), DenoisingObjective(), exemplars(), SETTINGS)
    torch.testing.assert_close(module.token.detach(), neutral_text()[0, :2].mean(0))
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    assert trained == {"token"} | {f"network.{n}" for n in base().state_dict() if n.endswith(KEYS_AND_VALUES)}


@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_the_new_tokens_place_is_the_first_empty_or_the_last(written: list[bool]) -> None:
    states = torch.tensor([[0.0, -0.5] if one else [0.0, 0.0] for one in written])
    expected = written.index(False) if False in written else len(written) - 1
    assert empty_place(states) == expected


def tuned(found: Customised) -> nn.Module:
    network = base()
    network.load_state_dict(dict(found.weights))
    return network


def test_customising_undone_gives_the_losses_of_the_model_before(found: Customised) -> None:
    network, objective, cpu = tuned(found), DenoisingObjective(), torch.device("cpu")
    layers = select_layers(network, "text_kv")
    batch, views = collate_samples("candidates", [*exemplars(), *exemplars()]), Views(timesteps=3)
    deltas = undone(network, layers, base().state_dict())
    with torch.no_grad():
        after, before = measure_losses(NetworkLoss(network, objective), deltas, views, batch, cpu)
        plain = [
            measure_losses(NetworkLoss(one, objective), DeltaStore({}, []), views, batch, cpu)[0]
            for one in (tuned(found), base())
        ]
    torch.testing.assert_close(after, plain[0])
    torch.testing.assert_close(before, plain[1], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(after, before, rtol=1e-3)


def test_customising_is_undone_as_a_whole_or_not_at_all(found: Customised) -> None:
    network, before = tuned(found), base().state_dict()
    values = [name for name in select_layers(network, "text_kv") if name.endswith("to_v")]
    with pytest.raises(InputError, match=r"to_k\.weight was another before customising; .*\.$"):
        undone(network, select_layers(network, values), before)
    layers = select_layers(network, "text_kv")
    for wrong in ({}, {**before, next(iter(before)): torch.zeros(1)}):
        with pytest.raises(InputError, match=r"^The weights before customising have no .* of shape "):
            undone(network, layers, wrong)


def test_the_token_counts_as_text_where_a_mask_tells_it_from_padding() -> None:
    # Padding that is not zero, as many encoders leave it.
    text = torch.randn(1, TOKENS, DIM, generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(TOKENS) < 2).float()[None]
    chosen = [replace(sample, conditions={"text": text, "text_mask": mask}) for sample in exemplars()]
    module = Customisation(base(), DenoisingObjective(), chosen, SETTINGS)
    torch.testing.assert_close(module.token.detach(), text[0, :2].mean(0))
    other = replace(training()[2], conditions=chosen[0].conditions, metadata=chosen[0].metadata)
    views, _, _ = module._draw(collate_samples("shard", [chosen[0], other]))
    assert views.conditions["text_mask"].tolist() == [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    torch.testing.assert_close(views.text[0, 2].detach(), module.token.detach())
    assert torch.equal(views.text[1], text[0])
