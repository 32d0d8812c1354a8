"""The machinery of a training: guard, CUDA graph, Muon, several processes, and the check of untrusted archives."""
