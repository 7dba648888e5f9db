"""The policy file, the gate, the decision record, compare-and-set promotion and the registry adapter."""
