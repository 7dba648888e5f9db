"""The stations of one cycle. Each package is one station; `core` is what they all stand on."""
