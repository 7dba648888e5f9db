"""What made an agent or a dataset: its graph, read from the ledger, printed, and verified byte by byte."""
