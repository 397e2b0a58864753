"""The demo: a small diffusion model of real handwritten digits, aligned to prefer ink."""
