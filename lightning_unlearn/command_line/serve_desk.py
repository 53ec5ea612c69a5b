"""The desk of `serve`: a model, its index, its training pictures, and what makes queries of questions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import lightning_unlearn
from lightning_unlearn.command_line.command_parts import many, say
from lightning_unlearn.command_line.index_answers import IndexAnswerer
from lightning_unlearn.command_line.serve_queries import Questions, query_maker
from lightning_unlearn.data.samples import Sample
from lightning_unlearn.data.shards import ShardInfo
from lightning_unlearn.datamodules import AttributionDataModule
from lightning_unlearn.datamodules.reading import read_samples
from lightning_unlearn.datamodules.sources import list_shards, with_facts
from lightning_unlearn.errors import InputError
from lightning_unlearn.fingerprints import settings_digest
from lightning_unlearn.index import Index
from lightning_unlearn.serving.captions import Captions
from lightning_unlearn.serving.contract import Answer, GroupRow
from lightning_unlearn.serving.desk import Desk, Provenance
from lightning_unlearn.serving.pictures import Pictures
from lightning_unlearn.unlearning.module import UnlearningModule
from lightning_unlearn.weights.precision import ExactFloat32

# So many samples tell which fields make groups.
LOOKED_AT = 128
MOST_GROUPS = LOOKED_AT // 2


@dataclass(frozen=True)
class Settings:
    """What is served.

    Attributes:
        index: Folder of the index.
        pipeline: Folder of the pipeline, if there is one.
        adapter: What lies on the network.
        tokens: Files of learned tokens.
        steps: Of the pipeline's sampler.
        guidance: Its scale.
    """

    index: str
    pipeline: str | None = None
    adapter: str | None = None
    tokens: tuple[str, ...] = ()
    steps: int | None = None
    guidance: float | None = None


@dataclass
class FromIndex:
    """An index's answers, one question at a time.

    Attributes:
        answerer: With the model.
    """

    answerer: IndexAnswerer
    _values: dict[str, Sequence[str | None]] = field(default_factory=dict)

    def answer(self, query: Sample) -> Answer:
        """See :class:`~lightning_unlearn.serving.contract.Answerer`."""
        started = time.monotonic()
        with ExactFloat32():
            found = self.answerer.answer([query])
        (sure,) = found.sure
        return Answer(
            found.scores[:, 0].double().cpu().numpy(),
            {name: part[:, 0].double().cpu().numpy() for name, part in found.parts.items()},
            sure.record(),
            time.monotonic() - started,
        )

    def groups(self, field: str, answer: Answer) -> Sequence[GroupRow]:
        """See :class:`~lightning_unlearn.serving.contract.Answerer`."""
        found = self.answerer.index.groups(field, torch.from_numpy(answer.scores)[:, None])
        return [
            GroupRow(
                "(not said)" if group.name is None else group.name,
                group.samples,
                float(group.mean[0]),
                float(group.low[0]),
                float(group.high[0]),
            )
            for group in found
        ]


def desk_of(module: UnlearningModule, data: AttributionDataModule, device: torch.device, settings: Settings) -> Desk:
    """Put the parts together.

    Args:
        module: The model.
        data: Names the training shards, which must be those of the index.
        device: Where the model runs.
        settings: What is served.

    Returns:
        The desk.

    Raises:
        InputError: If parts don't fit together.
    """
    index = Index.open(settings.index)
    if not len(index):
        raise InputError(f"The index in {settings.index} has no samples; make one of shards that hold some.")
    shards = _shards_of(index, data)
    module.loss.to(device)
    answerer = IndexAnswerer(module, index)
    starts = [shard for file, shard in zip(index.files, shards, strict=True) for _ in range(file.count)]

    def fetch(shard: ShardInfo, keys: frozenset[str]) -> Mapping[str, Sample]:
        return {sample.key: sample for sample in read_samples(shard, pictures=True, keys=keys)}

    def sample_at(row: int) -> Sample:
        key = index.keys[row]
        found = fetch(starts[row], frozenset({key}))
        if key not in found:
            raise InputError(f"{key!r} is not in its shard any more; make the index again.")
        return found[key]

    pictures = Pictures(index.keys, starts, fetch)
    questions = Questions(
        settings.pipeline,
        settings.adapter,
        settings.tokens,
        settings.steps,
        settings.guidance,
        index.captions,
        sample_at,
        Path(shards[0].url).parent,
    )
    maker = query_maker(module, questions, device)
    say(f"{many(len(index), 'training picture')} in the index; questions are answered on {device}.")
    return Desk(maker, FromIndex(answerer), Captions(index.captions), pictures, _fields(pictures), _provenance(index))


def _shards_of(index: Index, data: AttributionDataModule) -> list[ShardInfo]:
    """The index's shards as the config names them, since a record keeps no passwords of addresses."""
    from lightning_unlearn.data.shards import shard_id

    named = {
        shard_id(shard.url): shard for shard in with_facts(list_shards(data.shard_patterns, allow_pipe=data.allow_pipe))
    }
    lacking = [name for name in index.record["shards"] if name not in named]
    if lacking:
        raise InputError(
            f"The index has a shard {index.record['shards'][lacking[0]]['url']} that the config does not name; name "
            "the shards that the index was made of."
        )
    changed = [
        named[name].shown for name, about in index.record["shards"].items() if named[name].version != about["version"]
    ]
    if changed:
        raise InputError(
            f"Shard {changed[0]} is not as it was when the index was made; run `lightning-unlearn index` again."
        )
    return [named[name] for name in index.record["shards"]]


def _fields(pictures: Pictures) -> list[str]:
    """The fields by which some of the first samples make groups."""
    shown = pictures.shown(range(min(LOOKED_AT, len(pictures.keys))))
    names = dict.fromkeys(name for one in shown for name, value in one.facts.items() if isinstance(value, str))
    found = []
    for name in names:
        values = [one.facts.get(name) for one in shown]
        if 2 <= len({str(value) for value in values}) <= min(MOST_GROUPS, len(values) // 2):
            found.append(name)
    return found


def _provenance(index: Index) -> Provenance:
    prints = index.record["fingerprints"]
    versions = {name: about["version"] for name, about in index.record["shards"].items()}
    facts = {
        "model": prints["weights"],
        "data": settings_digest({"shards": versions}),
        "index": settings_digest(prints),
        "method": "mean of DAS and D-TRAK, standardised, by gradients in an index",
        "version": f"lightning-unlearn {lightning_unlearn.__version__}",
    }
    line = (
        f"{facts['version']} · {facts['method']} · model {facts['model'][:12]} · data {facts['data'][:12]} · "
        f"index {facts['index'][:12]}"
    )
    meaning = (
        "A score is what DAS and D-TRAK say of a training picture, each in standard deviations over all of them, and "
        "their mean: 0 is the average picture. It is evidence, and no share of the picture."
    )
    return Provenance("DAS and D-TRAK out of an index", meaning, line, facts)
