"""Embedders: texts to unit vectors, for embedding-hard negatives and scorers that compare texts."""

from autointerp.embed.sentence import DEFAULT_EMBEDDER, SentenceEmbedder, embedder_id, open_embedder, packaged_embedder

__all__ = ["DEFAULT_EMBEDDER", "SentenceEmbedder", "embedder_id", "open_embedder", "packaged_embedder"]
