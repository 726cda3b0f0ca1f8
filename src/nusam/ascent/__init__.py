"""How ε is found: by gradients or by what layers pass on, and what is trusted of the latter."""
