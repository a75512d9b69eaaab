"""The reference denoiser: a block-parallel diffusion language model on the public operations."""
