"""The canary in service."""
