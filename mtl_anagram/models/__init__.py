"""The networks that predict, and their loaders; nothing here knows the sampler."""
