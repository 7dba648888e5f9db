"""What every station stands on: identity, workspace, settings, the ledger, locks and errors."""
