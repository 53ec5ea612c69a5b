"""DiT and U-Nets of classes, or of nothing, against their pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_checks import assert_same_prediction, assert_training_loss
from pipeline_oracle import first_middle_last, recorded
from tiny_pipelines import dit as tiny
from torch import Tensor, nn
from toys import DIM, TOKENS, tiny_unet

from lightning_unlearn.data.conditions import Conditions
from lightning_unlearn.data.samples import ViewBatch
from lightning_unlearn.diffusion.families import family_of
from lightning_unlearn.errors import InputError
from lightning_unlearn.weights.parameters import select_layers

CLASSES: Conditions = {"class_label": torch.tensor([[3], [0], [1]])}


def pixel_unet(**overrides: Any) -> Any:
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(
            **{
                "sample_size": 8,
                "in_channels": 3,
                "out_channels": 3,
                "layers_per_block": 1,
                "block_out_channels": (8, 8),
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
                "attention_head_dim": 4,
                "norm_num_groups": 4,
                **overrides,
            }
        ).eval()


def test_dit_is_given_what_its_pipeline_gives_it(tmp_path: Any) -> None:
    from diffusers import DiTPipeline

    pipeline = DiTPipeline.from_pretrained(tiny.make(tmp_path / "dit"), local_files_only=True)
    with recorded(pipeline.transformer) as calls:
        pipeline([3, 0, 1], num_inference_steps=3, guidance_scale=4.0, generator=torch.Generator().manual_seed(0))
    for call in first_middle_last(calls):
        given = call.keywords
        rows = slice(3)  # guidance puts the class of none behind
        assert_same_prediction(pipeline.transformer, CLASSES, call, call.arguments[0], given["timestep"], rows)


def test_dit_is_given_what_its_pipeline_gives_the_class_of_none() -> None:
    network = tiny.network()
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([7])
    with torch.no_grad():
        ours = family_of(network).predict(
            network, noisy, timesteps, ViewBatch(noisy, {"class_label": torch.tensor([[1000]])})
        )
        torch.testing.assert_close(ours, network(noisy, timesteps, torch.tensor([1000])).sample[:, :4])


def test_loss_of_dit_is_that_of_the_noise_alone() -> None:
    def predict(network: Any, noisy: Tensor, timesteps: Tensor, given: Conditions) -> Tensor:
        out: Tensor = network(noisy, timesteps, given["class_label"][:, 0]).sample[:, :4]
        return out

    assert_training_loss(tiny.network(), CLASSES, {}, predict, (4, 8, 8))


def test_unconditional_unet_is_given_what_its_pipeline_gives_it() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    pipeline = DDPMPipeline(pixel_unet(), DDPMScheduler())
    with recorded(pipeline.unet) as calls:
        pipeline(batch_size=2, num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(0))
    for call in first_middle_last(calls):
        assert_same_prediction(pipeline.unet, {}, call, call.arguments[0], call.arguments[1], slice(None))


def test_loss_of_a_unet_with_classes() -> None:
    def predict(network: Any, noisy: Tensor, timesteps: Tensor, given: Conditions) -> Tensor:
        out: Tensor = network(noisy, timesteps, class_labels=given["class_label"][:, 0]).sample
        return out

    assert_training_loss(pixel_unet(num_class_embeds=5), CLASSES, {}, predict, (3, 8, 8))


@pytest.mark.parametrize("settings", [{"num_class_embeds": 5}, {"class_embed_type": "timestep"}])
def test_loss_of_a_unet_with_text_and_classes(settings: dict[str, Any]) -> None:
    def predict(network: Any, noisy: Tensor, timesteps: Tensor, given: Conditions) -> Tensor:
        out: Tensor = network(noisy, timesteps, given["text"], class_labels=given["class_label"][:, 0]).sample
        return out

    conditions = {**CLASSES, "text": torch.randn(3, TOKENS, DIM)}
    assert_training_loss(tiny_unet(**settings), conditions, {}, predict, (3, 8, 8))


def test_class_that_enters_as_a_timestep_is_handed_over() -> None:
    # diffusers can't call such a network in float64.
    network = pixel_unet(class_embed_type="timestep")
    noisy, timesteps = torch.randn(3, 3, 8, 8), torch.tensor([3, 500, 7])
    with torch.no_grad():
        ours = family_of(network).predict(network, noisy, timesteps, ViewBatch(noisy, CLASSES))
        torch.testing.assert_close(ours, network(noisy, timesteps, CLASSES["class_label"][:, 0]).sample)


def test_loss_of_an_unconditional_unet() -> None:
    def predict(network: Any, noisy: Tensor, timesteps: Tensor, _: Conditions) -> Tensor:
        out: Tensor = network(noisy, timesteps).sample
        return out

    assert_training_loss(pixel_unet(), {}, {}, predict, (3, 8, 8))


def test_selections_are_the_layers_they_name() -> None:
    network = tiny.network()
    blocks = [f"transformer_blocks.{number}" for number in range(2)]
    attention = [f"{block}.attn1.{name}" for block in blocks for name in ("to_q", "to_k", "to_v", "to_out.0")]
    assert list(select_layers(network, "attention")) == attention
    feeding = [f"{block}.ff.net.{name}" for block in blocks for name in ("0.proj", "2")]
    assert set(select_layers(network, "feed_forward")) == set(feeding)
    assert {*attention, *feeding} < set(select_layers(network, "auto"))
    unet = pixel_unet()
    assert len(select_layers(unet, "attention")) == 4 * sum(
        type(module).__name__ == "Attention" for module in unet.modules()
    )
    assert set(select_layers(unet, "auto")) == {
        name for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    for one in (network, unet):
        with pytest.raises(InputError, match="no weights that 'text_kv' means"):
            select_layers(one, "text_kv")


REFUSED: dict[str, tuple[nn.Module, tuple[int, ...], Conditions, str]] = {
    "no class": (tiny.network(), (4, 8, 8), {}, "'class_label', which the samples don't hold"),
    "a class too many": (tiny.network(), (4, 8, 8), {"class_label": torch.tensor([[1001]] * 2)}, "up to 1001"),
    "a class below": (pixel_unet(num_class_embeds=5), (3, 8, 8), {"class_label": torch.tensor([[-1]] * 2)}, "0 to 4"),
    "half a class": (pixel_unet(num_class_embeds=5), (3, 8, 8), {"class_label": torch.tensor([[0.5]] * 2)}, "whole"),
    "two classes": (tiny.network(), (4, 8, 8), {"class_label": torch.tensor([[1, 2]] * 2)}, "'class_label' is"),
    "another form": (tiny.network(), (4, 4, 16), {"class_label": torch.tensor([[1]] * 2)}, "4x16.*8x8 alone"),
    # No pipeline says which half is which.
    "a variance": (pixel_unet(out_channels=6), (3, 8, 8), {}, "predicts a variance beside the noise"),
    "ready classes": (pixel_unet(class_embed_type="identity"), (3, 8, 8), {}, "class_embed_type 'identity'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named(case: str) -> None:
    network, shape, conditions, says = REFUSED[case]
    noisy = torch.zeros(2, *shape)
    with pytest.raises(InputError, match=says):
        family_of(network).predict(network, noisy, torch.zeros(2, dtype=torch.int64), ViewBatch(noisy, conditions))
