"""The LightningModule: fit unlearns, predict gives deviations."""
