"""Commands beside those of the Trainer."""
