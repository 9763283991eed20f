"""Token shards, batches, and the preparation of text: docs/spec.md §6."""
