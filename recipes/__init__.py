"""How each model is trained: the update of a batch, the assembly around it, and resuming."""
