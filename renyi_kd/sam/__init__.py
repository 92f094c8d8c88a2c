"""Reading a SAM: where its features are, hooks that take them, running it. Imports nothing else of the package."""
