"""Diffusion without a network: options of sampling, the forward process with its schedules, and the samplers."""
