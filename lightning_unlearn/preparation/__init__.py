"""Pictures and captions, or ready arrays, to shards."""

from lightning_unlearn.preparation.prepare import prepare

__all__ = ["prepare"]
