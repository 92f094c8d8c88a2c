"""Runnable examples: fine-tuning a SAM with and without InfoSAM, and how the small SAM beside it was trained."""
