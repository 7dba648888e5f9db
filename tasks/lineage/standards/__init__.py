"""Lineage in the terms of others: SLSA provenance, OpenLineage, CycloneDX, model cards, PROV.

Each module turns `Material` into plain values or text. Nothing is invented: what the ledger and the files it names do
not say is left out, or said to be not recorded. The same ledger gives the same bytes.
"""
