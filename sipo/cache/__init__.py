"""The cache: what is computed once from a data set, which is latents, text embeddings and reference errors."""
