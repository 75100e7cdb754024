"""Enable and disable, the context of a forward pass, errors."""
