"""Rival methods that look at samples alone: random, pixels, texts, codes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from baseline_toys import samples, subject
from reference_baselines import cosine, late_interaction
from torch import Tensor, nn

from lightning_unlearn.baselines import (
    BASELINES,
    Baseline,
    EncoderSimilarity,
    GradientSimilarity,
    PixelSimilarity,
    Random,
    TextSimilarity,
)
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.draws.views import Views
from lightning_unlearn.errors import InputError

TRAINING, QUERIES = samples(7, (1, 3, 2)), samples(3, (2, 1), prefix="query")


def table(entry: object, training: list[Sample] = TRAINING, queries: list[Sample] = QUERIES) -> Tensor:
    return torch.tensor([[entry(sample, query) for query in queries] for sample in training], dtype=torch.float64)  # type: ignore[operator]


def codes(latents: Tensor) -> Tensor:
    """An encoder that is no cosine of its input."""
    return torch.stack([latents.flatten(1).amax(1), latents.flatten(1).std(1), latents[:, 0].mean((1, 2))], 1)


ALL: list[Baseline] = [
    Random(1),
    PixelSimilarity("cosine"),
    PixelSimilarity("l2"),
    PixelSimilarity("centred_cosine"),
    TextSimilarity("mean"),
    TextSimilarity("max"),
    TextSimilarity("max_token"),
    EncoderSimilarity(codes),
]


def test_random_is_uniform_and_of_its_seed() -> None:
    toy = subject(samples(200), QUERIES)
    scores = Random(3).scores(toy)
    assert scores.shape == (200, 3)
    assert 0.4 < scores.mean() < 0.6
    assert scores.min() >= 0
    assert scores.max() < 1
    assert abs(torch.corrcoef(scores.mT)[0, 1]) < 0.3
    assert torch.equal(scores, Random(3).scores(toy))
    assert not torch.equal(scores, Random(4).scores(toy))


def test_pixel_similarities_are_their_formulas() -> None:
    toy = subject(TRAINING, QUERIES)
    mean = sum(sample.latent.double() for sample in TRAINING) / len(TRAINING)
    expected = {
        "cosine": table(lambda z, q: cosine(z.latent, q.latent)),
        "l2": table(lambda z, q: -float(((z.latent - q.latent).double() ** 2).sum() ** 0.5)),
        "centred_cosine": table(lambda z, q: cosine(z.latent - mean, q.latent - mean)),
    }
    for similarity, scores in expected.items():
        torch.testing.assert_close(PixelSimilarity(similarity).scores(toy), scores, rtol=1e-6, atol=1e-9)  # type: ignore[arg-type]


def test_a_copy_of_the_query_is_nearest_to_it() -> None:
    toy = subject([*TRAINING, replace(QUERIES[1], key="copy")], QUERIES)
    for method in ALL[1:]:
        assert method.scores(toy)[:, 1].argmax() == len(TRAINING), method.settings()


def test_text_similarities_are_means_over_pairs_of_captions() -> None:
    def mean_over_pairs(pair: object) -> Tensor:
        return table(
            lambda z, q: sum(pair(a, b) for a in z.text for b in q.text) / len(z.text) / len(q.text)  # type: ignore[operator]
        )

    toy = subject(TRAINING, QUERIES)
    expected = {
        "mean": mean_over_pairs(lambda a, b: cosine(a.double().mean(0), b.double().mean(0))),
        "max": mean_over_pairs(lambda a, b: cosine(a.amax(0), b.amax(0))),
        "max_token": mean_over_pairs(late_interaction),
    }
    for pooling, scores in expected.items():
        torch.testing.assert_close(TextSimilarity(pooling).scores(toy), scores, rtol=1e-6, atol=1e-9)  # type: ignore[arg-type]


def test_text_similarity_looks_at_as_many_captions_as_the_views() -> None:
    toy = subject(TRAINING, QUERIES, Views(captions=1))
    first = subject(*([replace(s, conditions={"text": s.text[:1]}) for s in group] for group in (TRAINING, QUERIES)))
    torch.testing.assert_close(TextSimilarity().scores(toy), TextSimilarity().scores(first), rtol=1e-12, atol=0)


def test_padding_is_no_token() -> None:
    def padded(sample: Sample) -> Sample:
        return replace(sample, conditions={"text": torch.cat([sample.text, torch.zeros_like(sample.text)], 1)})

    toy = subject(TRAINING, QUERIES)
    longer = subject([padded(sample) for sample in TRAINING], [padded(query) for query in QUERIES])
    for method in ALL[4:7]:
        torch.testing.assert_close(method.scores(longer), method.scores(toy), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("similarity", ["cosine", "l2", "centred_cosine"])
def test_pixels_of_pictures_of_other_shapes_are_not_compared(similarity: str) -> None:
    wide, tall = torch.ones(1, 2, 8), torch.ones(1, 8, 2)
    sample, other = (replace(TRAINING[0], key=key, latent=latent) for key, latent in (("a", wide), ("b", tall)))
    for training, queries in (([sample], [other]), ([sample], [sample, other])):
        with pytest.raises(InputError, match=r"but that of '[ab]' is \(1, [28], [28]\) and that of the first query"):
            PixelSimilarity(similarity).scores(subject(training, queries))  # type: ignore[arg-type]


def test_what_a_mask_calls_padding_is_no_token_whatever_its_state() -> None:
    def padded(sample: Sample, captions: int) -> Sample:
        text = torch.cat([sample.text, torch.ones_like(sample.text)], 1)
        mask = (torch.arange(text.shape[1]) < sample.text.shape[1]).float().expand(captions, -1)
        return replace(sample, conditions={"text": text, "text_mask": mask})

    toy = subject(TRAINING, QUERIES)
    for each in (True, False):  # a mask a caption, or one for all
        groups = [[padded(one, len(one.text) if each else 1) for one in group] for group in (TRAINING, QUERIES)]
        for method in ALL[4:7]:
            torch.testing.assert_close(method.scores(subject(*groups)), method.scores(toy), rtol=1e-12, atol=1e-12)


def test_captions_count_by_their_shares_in_training() -> None:
    def caption(sample: Sample, number: int) -> Sample:
        metadata = {"captions": sample.captions[number : number + 1]}
        return replace(sample, conditions={"text": sample.text[number : number + 1]}, metadata=metadata)

    sample, query = samples(2, (3,))[1], samples(2, (2,), prefix="query")[1]
    shares, of_query = torch.tensor([0.9, 0.0, 0.1]), torch.tensor([0.2, 0.8])
    pairs = TextSimilarity().scores(
        subject([caption(sample, number) for number in range(3)], [caption(query, number) for number in range(2)])
    )
    shared = [
        replace(one, metadata={**one.metadata, "caption_weights": weights.tolist()})
        for one, weights in ((sample, shares), (query, of_query))
    ]
    found = TextSimilarity().scores(subject(shared[:1], shared[1:]))
    assert float(found) == pytest.approx(float(shares.double() @ pairs @ of_query.double()), rel=1e-6)


def test_encoder_similarity_takes_pictures_of_several_shapes() -> None:
    wide = replace(QUERIES[0], latent=torch.cat([QUERIES[0].latent, QUERIES[1].latent], -1))
    queries = [wide, QUERIES[2]]
    expected = table(lambda z, q: cosine(codes(z.latent[None]), codes(q.latent[None])), queries=queries)
    found = EncoderSimilarity(codes).scores(subject(TRAINING, queries))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_encoder_similarity_is_the_cosine_of_codes() -> None:
    expected = table(lambda z, q: cosine(codes(z.latent[None]), codes(q.latent[None])))
    torch.testing.assert_close(
        EncoderSimilarity(codes).scores(subject(TRAINING, QUERIES)), expected, rtol=1e-6, atol=1e-9
    )


def test_encoders_are_told_apart_by_their_weights() -> None:
    first, second = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    assert EncoderSimilarity(first).settings() != EncoderSimilarity(second).settings()
    assert EncoderSimilarity(first).settings() == EncoderSimilarity(first).settings()
    assert EncoderSimilarity(codes).settings()["encoder"].endswith("codes")


@pytest.mark.parametrize("method", ALL, ids=lambda method: str(sorted(method.settings().items())))
def test_order_of_samples_and_queries_and_size_of_batches_change_nothing(method: Baseline) -> None:
    expected = method.scores(subject(TRAINING, QUERIES, batch_size=3))
    order, columns = [4, 0, 6, 2, 1, 5, 3], [2, 0, 1]
    toy = subject([TRAINING[row] for row in order], [QUERIES[column] for column in columns], batch_size=2)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(method.scores(toy), expected[order][:, columns], rtol=1e-6, atol=1e-9)


def test_bad_encoders_are_refused() -> None:
    toy = subject(TRAINING, QUERIES)
    with pytest.raises(InputError, match=r"gives \(3, 3, 8, 8\) for 3 images, but must give \(images, D\)"):
        EncoderSimilarity(nn.Identity()).scores(toy)
    with pytest.raises(InputError, match="NaN or infinity"):
        EncoderSimilarity(lambda latents: latents.flatten(1) / 0).scores(toy)


def test_unknown_variants_are_refused() -> None:
    with pytest.raises(InputError, match="no pixel similarity 'l1'; choose one of cosine, l2, centred_cosine"):
        PixelSimilarity("l1")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no text pooling 'first'"):
        TextSimilarity("first")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no gradient similarity 'l2'"):
        GradientSimilarity("l2")  # type: ignore[arg-type]


def test_registry_holds_every_method_under_its_name() -> None:
    assert set(BASELINES) == {
        "undone",
        "random",
        "pixel_similarity",
        "text_similarity",
        "encoder_similarity",
        "gradient_similarity",
        "influence",
        "trak",
        "journey_trak",
        "d_trak",
        "das",
        "consensus",
    }
    assert all(kind.name == name for name, kind in BASELINES.items())
    assert PixelSimilarity("l2").settings() == {"method": "pixel_similarity", "similarity": "l2"}
