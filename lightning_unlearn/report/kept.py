"""What is kept of the samples that a report shows, while they stream by: never a latent, and no picture twice."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_unlearn.data.samples import Sample
from lightning_unlearn.report.groups import Membership
from lightning_unlearn.report.near_copies import Code, code_of
from lightning_unlearn.report.permissions import Permission, permission_of
from lightning_unlearn.report.pictures import Album, Picture, image_of


@dataclass(frozen=True)
class Kept:
    """What a page needs of a sample.

    Attributes:
        key: Its key.
        captions: Its captions.
        picture: ``None`` if there is nothing to see.
        permission: What its fields say of its licence.
        metadata: A query's json; nothing of a training image.
        sha256: Of a query's encoded picture, as it lies in its shard.
    """

    key: str
    captions: list[str]
    picture: Picture | None
    permission: Permission | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sha256: str | None = None


def keep_queries(queries: Iterable[Sample], album: Album) -> dict[str, Kept]:
    """What the report needs of queries.

    Args:
        queries: One after the other.
        album: Where pictures go.

    Returns:
        By key.
    """
    kept = {}
    for query in queries:
        image = image_of(query)
        kept[query.key] = Kept(
            query.key,
            query.captions,
            None if image is None else album.place(image),
            metadata=query.metadata,
            sha256=None if query.picture is None else hashlib.sha256(query.picture).hexdigest(),
        )
    return kept


def keep_samples(
    samples: Iterable[Sample],
    shown: Collection[str],
    looked_at: Collection[str],
    memberships: Sequence[Membership],
    album: Album,
) -> tuple[dict[str, Kept], dict[str, Code]]:
    """What the report needs of training images.

    Args:
        samples: One after the other.
        shown: Keys of those that may be shown.
        looked_at: Keys of those among which near-copies are looked for.
        memberships: These take in every sample.
        album: Where pictures go.

    Returns:
        Those that may be shown, and the codes of those that are looked at and have a picture.
    """
    kept, codes = {}, {}
    for sample in samples:
        for membership in memberships:
            membership.add(sample.key, sample.metadata)
        is_shown, is_looked_at = sample.key in shown, sample.key in looked_at
        if not is_shown and not is_looked_at:
            continue
        image = image_of(sample)
        if image is not None and is_looked_at:
            codes[sample.key] = code_of(image)
        if is_shown:
            picture = None if image is None else album.place(image)
            kept[sample.key] = Kept(sample.key, sample.captions, picture, permission_of(sample.metadata))
    return kept, codes
