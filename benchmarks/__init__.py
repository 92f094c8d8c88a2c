"""What the package is measured against, and how."""
