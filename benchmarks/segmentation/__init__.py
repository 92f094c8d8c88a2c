"""Does it help? Fine-tuning with and without distillers, on real weights and data, one command per row."""
