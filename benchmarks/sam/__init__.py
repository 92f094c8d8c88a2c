"""SAMs to fine-tune and images to fine-tune them on."""
