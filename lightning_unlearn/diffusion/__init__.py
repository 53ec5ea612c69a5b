"""A denoiser and its loss: families of networks, objectives, noise schedules, loading, sampling."""
