"""The reward model: pairs from replay, training, and the validation whose verdict is part of the gate."""
