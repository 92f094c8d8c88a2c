"""The small SAM of examples/assets, trained from scratch on generated scenes."""
