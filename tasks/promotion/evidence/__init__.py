"""What the gate weighs: one module for each kind of evidence, each of pure functions (evidence, policy) -> items."""
