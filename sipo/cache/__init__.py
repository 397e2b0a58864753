"""What is computed once of a data set and kept: latents, text embeddings and errors of the reference."""
