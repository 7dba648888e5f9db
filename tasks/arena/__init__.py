"""Environments with verifiable rewards: the tasks that agents are trained and judged on."""
