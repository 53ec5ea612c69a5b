"""The form of the data: samples, masks, targets and shards."""
